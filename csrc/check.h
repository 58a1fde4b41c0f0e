// Argument checks shared by every backend, so that the same mistake reads the same everywhere.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>

namespace psilora {

constexpr int64_t kMaxRank = 128;

inline void check_spd_solve(const at::Tensor& gram, const at::Tensor& rhs) {
  const auto dtype = gram.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble, "spd_solve: Invalid gram dtype ", dtype,
      ". Must be float32 or float64.");
  TORCH_CHECK_TYPE(
      rhs.scalar_type() == dtype, "spd_solve: Invalid rhs dtype ", rhs.scalar_type(),
      ". Must be the dtype of gram, ", dtype, ".");
  TORCH_CHECK_VALUE(
      gram.device() == rhs.device(), "spd_solve: Invalid rhs device ", rhs.device(),
      ". Must be the device of gram, ", gram.device(), ".");
  TORCH_CHECK_VALUE(
      gram.dim() == 3 && gram.size(1) == gram.size(2), "spd_solve: Invalid gram shape ", gram.sizes(),
      ". Must be (L, r, r).");
  const int64_t systems = gram.size(0);
  const int64_t rank = gram.size(1);
  TORCH_CHECK_VALUE(
      rank >= 1 && rank <= kMaxRank, "spd_solve: Invalid rank r=", rank, ". Must be in [1, ", kMaxRank, "].");
  TORCH_CHECK_VALUE(
      rhs.dim() == 3 && rhs.size(0) == systems && rhs.size(1) == rank, "spd_solve: Invalid rhs shape ",
      rhs.sizes(), ". Must be (", systems, ", ", rank, ", n) to match gram.");
}

}  // namespace psilora
