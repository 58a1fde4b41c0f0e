// psilora::spd_solve on CUDA: launch geometry around the device code of spd_solve_kernel.cuh.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../check.h"
#include "spd_solve_kernel.cuh"

namespace psilora::cuda {
namespace {

constexpr int kWarp = 32;
// What a kernel may use without asking.
constexpr int kDefaultSharedBytes = 48 * 1024;

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

Strides strides_of(const at::Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

template <typename T>
void launch(const at::Tensor& gram, const at::Tensor& rhs, at::Tensor& solution, at::Tensor& info) {
  const int device = rhs.get_device();
  const int64_t systems = rhs.size(0);
  const int64_t columns = rhs.size(2);
  const int rank = static_cast<int>(rhs.size(1));

  const int limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  auto bytes = [&](int64_t tile) { return static_cast<int>(shared_elements(rank, tile) * sizeof(T)); };
  int64_t tile = std::min<int64_t>(kThreads, round_up(columns, kWarp));
  while (tile > kWarp && bytes(tile) > limit) tile -= kWarp;
  TORCH_CHECK(
      bytes(tile) <= limit, "spd_solve: r=", rank, " needs ", bytes(tile),
      " bytes of shared memory per block. This device has ", limit, ".");

  // Where systems alone leave multiprocessors idle, several blocks repeat one factorisation and share its
  // work.
  const int64_t wanted = 2 * attribute(cudaDevAttrMultiProcessorCount, device) / systems;
  const int64_t tiles = (columns + tile - 1) / tile;
  const int64_t splits = std::max<int64_t>(1, std::min(wanted, tiles));
  const int64_t tiles_per_block = (tiles + splits - 1) / splits;
  const dim3 grid(systems, (tiles + tiles_per_block - 1) / tiles_per_block);

  const SpdSolveArgs<T> args{
      gram.const_data_ptr<T>(),
      rhs.const_data_ptr<T>(),
      solution.mutable_data_ptr<T>(),
      info.mutable_data_ptr<int>(),
      strides_of(gram),
      strides_of(rhs),
      columns,
      tiles_per_block * tile,
      rank,
      static_cast<int>(tile)};
  if (bytes(tile) > kDefaultSharedBytes)
    C10_CUDA_CHECK(
        cudaFuncSetAttribute(spd_solve_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes(tile)));
  spd_solve_kernel<T><<<grid, kThreads, bytes(tile), c10::cuda::getCurrentCUDAStream(device)>>>(args);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<at::Tensor, at::Tensor> spd_solve(const at::Tensor& gram, const at::Tensor& rhs) {
  check_spd_solve(gram, rhs);
  const c10::cuda::CUDAGuard guard(rhs.device());
  at::Tensor solution = at::empty(rhs.sizes(), rhs.options());
  if (rhs.numel() == 0) return {solution, at::zeros({rhs.size(0)}, rhs.options().dtype(at::kInt))};
  at::Tensor info = at::empty({rhs.size(0)}, rhs.options().dtype(at::kInt));
  AT_DISPATCH_FLOATING_TYPES(
      gram.scalar_type(), "spd_solve", [&] { launch<scalar_t>(gram, rhs, solution, info); });
  return {solution, info};
}

}  // namespace

TORCH_LIBRARY_IMPL(psilora, CUDA, m) { m.impl("spd_solve", &spd_solve); }

}  // namespace psilora::cuda
