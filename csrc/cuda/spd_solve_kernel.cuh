// Device code of psilora::spd_solve, free of torch headers: it compiles with nvcc alone, and with a plain C++
// compiler after host_emulation.h, which runs the same source on the CPU for tests.
//
// One block per system (and per range of columns where there are few systems). The factor L sits in shared
// memory in panels of four rows, and everything works on 4×4 blocks of it:
//   panel p holds rows 4p … 4p+3, columns 0 … 4p+3; entry (i, k) is at panel_offset(i/4) + 4·k + i%4,
// so four coefficients are one vector load, and the gap of four elements between panels makes the eight
// panels that a warp's 32 rows touch start in different banks. The diagonal holds 1/L_ii.
#pragma once

#include "../ridge.h"

#ifndef PSILORA_SHARED_MEMORY
#define PSILORA_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace psilora::cuda {

constexpr int kPanel = 4;
constexpr int kThreads = 128;

struct Strides {
  long long system;
  long long row;
  long long column;
};

template <typename T>
struct SpdSolveArgs {
  const T* gram;
  const T* rhs;
  T* solution;  // contiguous (L, r, n)
  int* info;
  Strides gram_strides;
  Strides rhs_strides;
  long long columns;
  long long columns_per_block;  // range of one blockIdx.y
  int rank;
  int tile_columns;  // columns in shared memory at once, one thread each; at most blockDim.x
};

PSILORA_HOST_DEVICE int panels_of(int rank) { return (rank + kPanel - 1) / kPanel; }
PSILORA_HOST_DEVICE int panel_offset(int panel) { return 8 * panel * (panel + 1) + 4 * panel; }
PSILORA_HOST_DEVICE int factor_elements(int rank) {
  const int last = panels_of(rank) - 1;
  return panel_offset(last) + 16 * (last + 1);
}

// Shared memory of a block, in elements.
PSILORA_HOST_DEVICE int shared_elements(int rank, int tile_columns) {
  return factor_elements(rank) + kPanel * panels_of(rank) * tile_columns;
}

template <typename T>
struct alignas(16) Quad {
  T v[kPanel];
};

template <typename T>
__device__ __forceinline__ Quad<T> load_quad(const T* from) {
  return *reinterpret_cast<const Quad<T>*>(from);
}

__device__ __forceinline__ float reciprocal_root(float value) { return __frsqrt_rn(value); }
__device__ __forceinline__ double reciprocal_root(double value) { return rsqrt(value); }

// Every thread of the block gets the same answer. Stops at the first row that holds a nonzero.
template <typename T>
__device__ bool rhs_is_zero(const SpdSolveArgs<T>& args, const T* rhs) {
  for (int row = 0; row < args.rank; ++row) {
    const T* entries = rhs + row * args.rhs_strides.row;
    bool nonzero = false;
    for (long long column = threadIdx.x; column < args.columns; column += blockDim.x)
      nonzero |= entries[column * args.rhs_strides.column] != T(0);
    if (__syncthreads_or(nonzero)) return false;
  }
  return true;
}

// The lower triangle of gram, plus `added` on its diagonal, padded with rows of the identity to whole panels.
template <typename T>
__device__ void load_gram(const SpdSolveArgs<T>& args, const T* gram, T added, T* factor) {
  const int padded = kPanel * panels_of(args.rank);
  for (int entry = threadIdx.x; entry < padded * padded; entry += blockDim.x) {
    const int row = entry / padded;
    const int column = entry % padded;
    if (column / kPanel > row / kPanel) continue;
    T value = T(0);
    if (row < args.rank && column <= row)
      value = gram[row * args.gram_strides.row + column * args.gram_strides.column];
    if (row == column) value = row < args.rank ? value + added : T(1);
    factor[panel_offset(row / kPanel) + kPanel * column + row % kPanel] = value;
  }
}

// Cholesky of a 4×4 diagonal block in registers, the same in every thread: its verdict needs no
// communication.
template <typename T>
__device__ __forceinline__ bool factor_block(const T* from, T (&block)[kPanel][kPanel]) {
#pragma unroll
  for (int k = 0; k < kPanel; ++k) {
    const Quad<T> column = load_quad(from + kPanel * k);
#pragma unroll
    for (int i = 0; i < kPanel; ++i) block[i][k] = column.v[i];
  }
#pragma unroll
  for (int k = 0; k < kPanel; ++k) {
    T pivot = block[k][k];
#pragma unroll
    for (int j = 0; j < k; ++j) pivot -= block[k][j] * block[k][j];
    if (!positive_finite(pivot)) return false;
    block[k][k] = reciprocal_root(pivot);
#pragma unroll
    for (int i = k + 1; i < kPanel; ++i) {
      T value = block[i][k];
#pragma unroll
      for (int j = 0; j < k; ++j) value -= block[i][j] * block[k][j];
      block[i][k] = value * block[k][k];
    }
  }
  return true;
}

// Right-looking, four columns at a time, two barriers per panel. False at the first pivot that is not
// positive and finite, in all threads alike; shared memory may still be read by slower threads then.
template <typename T>
__device__ bool factorise(T* factor, int panels) {
  for (int p = 0; p < panels; ++p) {
    const int first = kPanel * (p + 1);
    const int rows = kPanel * panels - first;
    T* diagonal = factor + panel_offset(p) + 16 * p;
    T block[kPanel][kPanel];
    if (!factor_block(diagonal, block)) return false;

    for (int i = first + threadIdx.x; i < first + rows; i += blockDim.x) {
      T* row = factor + panel_offset(i / kPanel) + 16 * p + i % kPanel;
      T value[kPanel];
#pragma unroll
      for (int k = 0; k < kPanel; ++k) {
        value[k] = row[kPanel * k];
#pragma unroll
        for (int j = 0; j < k; ++j) value[k] -= value[j] * block[k][j];
        value[k] *= block[k][k];
        row[kPanel * k] = value[k];
      }
    }
    __syncthreads();

    if (threadIdx.x == 0) {
#pragma unroll
      for (int k = 0; k < kPanel; ++k)
#pragma unroll
        for (int i = k; i < kPanel; ++i) diagonal[kPanel * k + i] = block[i][k];
    }
    // Row i minus its product with the new columns; threads share rows once there are fewer rows than
    // threads.
    const int sharers = rows > 0 && rows < static_cast<int>(blockDim.x) ? blockDim.x / rows : 1;
    for (int unit = threadIdx.x; unit < rows * sharers; unit += blockDim.x) {
      const int i = first + unit % rows;
      T* row = factor + panel_offset(i / kPanel) + i % kPanel;
      T left[kPanel];
#pragma unroll
      for (int k = 0; k < kPanel; ++k) left[k] = row[16 * p + kPanel * k];
#pragma unroll 1
      for (int q = p + 1 + unit / rows; q <= i / kPanel; q += sharers) {
        T value[kPanel];
#pragma unroll
        for (int j = 0; j < kPanel; ++j) value[j] = row[16 * q + kPanel * j];
#pragma unroll
        for (int k = 0; k < kPanel; ++k) {
          const Quad<T> right = load_quad(factor + panel_offset(q) + 16 * p + kPanel * k);
#pragma unroll
          for (int j = 0; j < kPanel; ++j) value[j] -= left[k] * right.v[j];
        }
#pragma unroll
        for (int j = 0; j < kPanel; ++j) row[16 * q + kPanel * j] = value[j];
      }
    }
    __syncthreads();
  }
  return true;
}

// Returns the number of failed attempts, the same in every thread; kAttempts means that no factor is there.
template <typename T>
__device__ int factorise_with_repair(const SpdSolveArgs<T>& args, const T* gram, T* factor) {
  const int panels = panels_of(args.rank);
  T largest = T(0);
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    if (attempt == 1) {
      for (int i = 0; i < args.rank; ++i)
        largest = largest_magnitude(largest, gram[i * (args.gram_strides.row + args.gram_strides.column)]);
      if (!positive_finite(largest)) return kAttempts;
    }
    __syncthreads();  // a failed attempt may still be read
    load_gram(args, gram, ridge(attempt, args.rank, largest), factor);
    __syncthreads();
    if (factorise(factor, panels)) return attempt;
  }
  return kAttempts;
}

// L·Lᵀ·x = rhs for one column, by one thread. `work` is its column of the tile, `step` elements from row to
// row: shared memory serves as indexable registers, so no barrier is needed.
template <typename T>
__device__ void solve_column(
    const T* factor,
    int rank,
    const T* rhs,
    long long rhs_step,
    T* solution,
    long long solution_step,
    T* work,
    int step) {
  const int panels = panels_of(rank);
#pragma unroll 1
  for (int p = 0; p < panels; ++p) {
    T value[kPanel];
#pragma unroll
    for (int m = 0; m < kPanel; ++m) {
      const int row = kPanel * p + m;
      value[m] = row < rank ? rhs[row * rhs_step] : T(0);
    }
    const T* coefficients = factor + panel_offset(p);
#pragma unroll 1
    for (int q = 0; q < p; ++q) {
#pragma unroll
      for (int k = 0; k < kPanel; ++k) {
        const T finished = work[(kPanel * q + k) * step];
        const Quad<T> column = load_quad(coefficients + 16 * q + kPanel * k);
#pragma unroll
        for (int m = 0; m < kPanel; ++m) value[m] -= column.v[m] * finished;
      }
    }
    const T* diagonal = coefficients + 16 * p;
#pragma unroll
    for (int m = 0; m < kPanel; ++m) {
#pragma unroll
      for (int k = 0; k < m; ++k) value[m] -= diagonal[kPanel * k + m] * value[k];
      value[m] *= diagonal[kPanel * m + m];
      work[(kPanel * p + m) * step] = value[m];
    }
  }
#pragma unroll 1
  for (int p = panels - 1; p >= 0; --p) {
    T value[kPanel];
#pragma unroll
    for (int m = 0; m < kPanel; ++m) value[m] = work[(kPanel * p + m) * step];
#pragma unroll 1
    for (int q = p + 1; q < panels; ++q) {
      const T* coefficients = factor + panel_offset(q) + 16 * p;
      T finished[kPanel];
#pragma unroll
      for (int k = 0; k < kPanel; ++k) finished[k] = work[(kPanel * q + k) * step];
#pragma unroll
      for (int m = 0; m < kPanel; ++m) {
        const Quad<T> column = load_quad(coefficients + kPanel * m);
#pragma unroll
        for (int k = 0; k < kPanel; ++k) value[m] -= column.v[k] * finished[k];
      }
    }
    const T* diagonal = factor + panel_offset(p) + 16 * p;
#pragma unroll
    for (int m = kPanel - 1; m >= 0; --m) {
#pragma unroll
      for (int k = m + 1; k < kPanel; ++k) value[m] -= diagonal[kPanel * m + k] * value[k];
      value[m] *= diagonal[kPanel * m + m];
      const int row = kPanel * p + m;
      work[row * step] = value[m];
      if (row < rank) solution[row * solution_step] = value[m];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) spd_solve_kernel(const SpdSolveArgs<T> args) {
  PSILORA_SHARED_MEMORY(shared);
  T* factor = reinterpret_cast<T*>(shared);
  T* tile = factor + factor_elements(args.rank);

  const long long system = blockIdx.x;
  const long long begin = blockIdx.y * args.columns_per_block;
  const long long end =
      begin + args.columns_per_block < args.columns ? begin + args.columns_per_block : args.columns;
  const T* gram = args.gram + system * args.gram_strides.system;
  const T* rhs = args.rhs + system * args.rhs_strides.system;
  T* solution = args.solution + system * args.rank * args.columns;

  const bool zero = rhs_is_zero(args, rhs);
  const int failed = zero ? 0 : factorise_with_repair(args, gram, factor);
  if (blockIdx.y == 0 && threadIdx.x == 0) args.info[system] = failed;

  const bool usable = !zero && failed < kAttempts;
  if (static_cast<int>(threadIdx.x) >= args.tile_columns) return;
  for (long long column = begin + threadIdx.x; column < end; column += args.tile_columns) {
    if (usable)
      solve_column(
          factor, args.rank, rhs + column * args.rhs_strides.column, args.rhs_strides.row, solution + column,
          args.columns, tile + threadIdx.x, args.tile_columns);
    else
      for (int row = 0; row < args.rank; ++row) solution[row * args.columns + column] = T(0);
  }
}

}  // namespace psilora::cuda
