// psilora::spd_solve on the CPU: systems in parallel, columns too where there are fewer systems than threads.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../check.h"
#include "../ridge.h"
#include "spd_kernel.h"

namespace psilora::cpu {
namespace {

// Work below which handing a chunk to another thread costs more than it saves.
constexpr int64_t kGrainFlops = 200'000;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

template <typename T>
class Solver {
 public:
  Solver(const at::Tensor& gram, const at::Tensor& rhs, at::Tensor& solution, at::Tensor& info)
      : gram_(gram.const_data_ptr<T>()),
        rhs_(rhs.const_data_ptr<T>()),
        solution_(solution.mutable_data_ptr<T>()),
        info_(info.mutable_data_ptr<int32_t>()),
        gram_strides_(gram.strides()),
        rhs_strides_(rhs.strides()),
        systems_(rhs.size(0)),
        rank_(rhs.size(1)),
        columns_(rhs.size(2)),
        padded_rank_(round_up(rank_, kPanel)),
        stride_(round_up(padded_rank_, kernel_.lanes)) {}

  void run() const {
    const bool columns_too = systems_ < at::get_num_threads() && columns_ > kernel_.tile_columns;
    columns_too ? run_by_columns() : run_by_systems();
  }

 private:
  static constexpr int64_t kAlign = 64 / sizeof(T);

  int64_t factor_size() const { return round_up(padded_rank_ * (stride_ + 1), kAlign); }
  int64_t tile_size() const { return padded_rank_ * kernel_.tile_columns; }

  // One allocation, aligned to a cache line, reused for every system of a chunk.
  static T* aligned(std::vector<T>& storage, int64_t size) {
    storage.resize(size + kAlign);
    const auto offset = reinterpret_cast<uintptr_t>(storage.data()) % 64 / sizeof(T);
    return storage.data() + (offset == 0 ? 0 : kAlign - offset);
  }

  Factor<T> factor_at(T* memory) const {
    return {memory, memory + padded_rank_ * stride_, padded_rank_, stride_};
  }

  int64_t grain(int64_t columns) const {
    const int64_t flops = rank_ * rank_ * (rank_ / 3 + 2 * columns) + 1;
    return std::max<int64_t>(1, kGrainFlops / flops);
  }

  void run_by_systems() const {
    at::parallel_for(0, systems_, grain(columns_), [&](int64_t begin, int64_t end) {
      std::vector<T> storage;
      T* memory = aligned(storage, factor_size() + tile_size());
      for (int64_t system = begin; system < end; ++system) {
        const Factor<T> factor = factor_at(memory);
        solve(system, prepare(system, factor), factor, 0, columns_, memory + factor_size());
      }
    });
  }

  void run_by_columns() const {
    std::vector<T> storage;
    T* factors = aligned(storage, systems_ * factor_size());
    std::vector<char> usable(systems_);
    at::parallel_for(0, systems_, grain(0), [&](int64_t begin, int64_t end) {
      for (int64_t system = begin; system < end; ++system)
        usable[system] = prepare(system, factor_at(factors + system * factor_size()));
    });
    const int64_t width = kernel_.tile_columns;
    const int64_t tiles = (columns_ + width - 1) / width;
    at::parallel_for(0, systems_ * tiles, grain(width), [&](int64_t begin, int64_t end) {
      std::vector<T> tile_storage;
      T* tile = aligned(tile_storage, tile_size());
      for (int64_t task = begin; task < end; ++task) {
        const int64_t system = task / tiles;
        const int64_t first = task % tiles * width;
        const Factor<T> factor = factor_at(factors + system * factor_size());
        solve(system, usable[system], factor, first, std::min(columns_, first + width), tile);
      }
    });
  }

  // Writes info and returns whether the factor may be used; if not, the solution is zero.
  bool prepare(int64_t system, const Factor<T>& factor) const {
    info_[system] = 0;
    if (rhs_is_zero(system)) return false;
    fill(system, factor, 0);
    if (kernel_.factorise(factor)) return true;
    const T largest = largest_diagonal(system);
    if (positive_finite(largest)) {
      for (int attempt = 1; attempt < kAttempts; ++attempt) {
        fill(system, factor, ridge(attempt, static_cast<int>(rank_), largest));
        info_[system] = attempt;
        if (kernel_.factorise(factor)) return true;
      }
    }
    info_[system] = kAttempts;
    return false;
  }

  void solve(
      int64_t system, bool usable, const Factor<T>& factor, int64_t begin, int64_t end, T* tile) const {
    T* solution = solution_ + system * rank_ * columns_ + begin;
    if (usable) {
      const T* rhs = rhs_ + system * rhs_strides_[0] + begin * rhs_strides_[2];
      kernel_.solve(
          factor, rank_, {rhs, rhs_strides_[1], rhs_strides_[2]}, {solution, columns_, 1}, end - begin, tile);
      return;
    }
    for (int64_t i = 0; i < rank_; ++i) std::fill_n(solution + i * columns_, end - begin, T(0));
  }

  // Stops at the first entry that is not zero, so it costs a full pass only where the answer is yes.
  bool rhs_is_zero(int64_t system) const {
    const T* rhs = rhs_ + system * rhs_strides_[0];
    for (int64_t i = 0; i < rank_; ++i)
      for (int64_t j = 0; j < columns_; ++j)
        if (rhs[i * rhs_strides_[1] + j * rhs_strides_[2]] != T(0)) return false;
    return true;
  }

  T largest_diagonal(int64_t system) const {
    const T* gram = gram_ + system * gram_strides_[0];
    T largest = 0;
    for (int64_t i = 0; i < rank_; ++i)
      largest = largest_magnitude(largest, gram[i * (gram_strides_[1] + gram_strides_[2])]);
    return largest;
  }

  // The lower triangle of gram, transposed into the upper triangle of the factor, padded with the identity.
  void fill(int64_t system, const Factor<T>& factor, T added) const {
    const T* gram = gram_ + system * gram_strides_[0];
    const int64_t down = gram_strides_[1];
    const int64_t across = gram_strides_[2];
    for (int64_t i = 0; i < padded_rank_; ++i) {
      T* row = factor.upper + i * stride_;
      // Left of the diagonal and past the rank: never part of a result, but the vectors carry them along.
      std::fill_n(row, stride_, T(0));
      for (int64_t j = i; j < rank_; ++j) row[j] = gram[j * down + i * across];
      row[i] = i < rank_ ? row[i] + added : T(1);
    }
  }

  const SpdKernel<T>& kernel_ = spd_kernel<T>();
  const T* gram_;
  const T* rhs_;
  T* solution_;
  int32_t* info_;
  at::IntArrayRef gram_strides_;
  at::IntArrayRef rhs_strides_;
  int64_t systems_;
  int64_t rank_;
  int64_t columns_;
  int64_t padded_rank_;
  int64_t stride_;
};

std::tuple<at::Tensor, at::Tensor> spd_solve(const at::Tensor& gram, const at::Tensor& rhs) {
  check_spd_solve(gram, rhs);
  at::Tensor solution = at::empty(rhs.sizes(), rhs.options());
  at::Tensor info = at::empty({rhs.size(0)}, rhs.options().dtype(at::kInt));
  AT_DISPATCH_FLOATING_TYPES(
      gram.scalar_type(), "spd_solve", [&] { Solver<scalar_t>(gram, rhs, solution, info).run(); });
  return {solution, info};
}

}  // namespace

TORCH_LIBRARY_IMPL(psilora, CPU, m) { m.impl("spd_solve", &spd_solve); }

}  // namespace psilora::cpu
