// The CUDA spd_solve on the CPU, for tests/test_native.py and never part of the extension: a shared library,
// or a program to run under a race detector (PSILORA_RACE_CHECK).
#include "host_emulation.h"

#include "spd_solve_kernel.cuh"

namespace {

using namespace psilora::cuda;

// Contiguous (L, r, r) and (L, r, n). The tile and the columns of a block are free, to reach every path.
template <typename T>
void run(const T* gram, const T* rhs, T* solution, int* info, const int* sizes) {
  const int systems = sizes[0], rank = sizes[1], columns = sizes[2];
  const int tile_columns = sizes[3], columns_per_block = sizes[4], threads = sizes[5];
  const SpdSolveArgs<T> args{
      gram,
      rhs,
      solution,
      info,
      {1LL * rank * rank, rank, 1},
      {1LL * rank * columns, columns, 1},
      columns,
      columns_per_block,
      rank,
      tile_columns};
  const Index grid{unsigned(systems), unsigned((columns + columns_per_block - 1) / columns_per_block)};
  emulation::launch(
      grid, threads, shared_elements(rank, tile_columns) * sizeof(T), [&] { spd_solve_kernel<T>(args); });
}

}  // namespace

extern "C" void emulate_float32(
    const float* gram, const float* rhs, float* solution, int* info, const int* sizes) {
  run(gram, rhs, solution, info, sizes);
}

extern "C" void emulate_float64(
    const double* gram, const double* rhs, double* solution, int* info, const int* sizes) {
  run(gram, rhs, solution, info, sizes);
}

#ifdef PSILORA_RACE_CHECK
// Two systems, the second singular so that it takes the repair path; results are checked elsewhere.
int main() {
  const int systems = 2, rank = 33, columns = 40;
  const int sizes[] = {systems, rank, columns, 32, 64, 64};
  std::vector<float> gram(systems * rank * rank, 1.0f), rhs(systems * rank * columns, 1.0f),
      solution(rhs.size());
  for (int i = 0; i < rank; ++i) gram[i * rank + i] = 2.0f * rank;
  std::vector<int> info(systems);
  run(gram.data(), rhs.data(), solution.data(), info.data(), sizes);
}
#endif
