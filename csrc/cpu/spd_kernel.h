// Interface of the vectorised CPU kernels, free of torch headers; spd_kernel.cpp picks the widest build.
#pragma once

#include <cstdint>

namespace psilora::cpu {

// Rows eliminated together. Factors and tiles are padded to a multiple of it with rows of the identity.
constexpr int64_t kPanel = 4;

// U with UᵀU = gram, row-major with leading dimension `stride`, and 1/U_ii in `inverse`.
// Only the upper triangle means anything.
template <typename T>
struct Factor {
  T* upper;
  T* inverse;
  int64_t padded_rank;
  int64_t stride;
};

template <typename T>
struct View {
  T* data;
  int64_t row_stride;
  int64_t column_stride;
};

template <typename T>
struct SpdKernel {
  int64_t lanes;         // elements of one vector; Factor::stride is a multiple of it
  int64_t tile_columns;  // columns `solve` takes at once; its `tile` holds padded_rank × tile_columns
  // Overwrites the symmetric matrix held in the upper triangle by U.
  // False at the first pivot that is not positive and finite.
  bool (*factorise)(const Factor<T>& factor);
  // Solves UᵀU·x = rhs for `columns` columns of `rank` rows; `solution` has unit column stride.
  void (*solve)(
      const Factor<T>& factor, int64_t rank, View<const T> rhs, View<T> solution, int64_t columns, T* tile);
};

template <typename T>
const SpdKernel<T>& spd_kernel();

}  // namespace psilora::cpu
