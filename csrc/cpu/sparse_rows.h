// A matrix most of whose entries are 0, by those that are not: by row, and by (block of rows, column) as the pairs of
// a layout are, so that the products over pairs serve. T is float or double.
#pragma once

#include <cstdint>
#include <vector>

#include "../pairs.h"

namespace monet::cpu {

template <class T>
class SparseRows {
 public:
  // dense [rows, columns]. NaN is not 0.
  SparseRows(const T* dense, int64_t rows, int64_t columns);

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t count() const { return row_start_[rows_]; }
  const int32_t* row_start() const { return row_start_.data(); }  // [rows + 1] first entry of a row
  const int32_t* column() const { return column_.data(); }        // [count] ascending within a row
  const T* values() const { return values_.data(); }              // [count]

 private:
  int64_t rows_, columns_;
  std::vector<int32_t> row_start_, column_;
  std::vector<T> values_;
};

template <class T>
class SparseGroups {
 public:
  explicit SparseGroups(const SparseRows<T>& sparse);

  // A row of the matrix is a token, a column a half-expert. Without the pairs of a token.
  Pairs pairs() const;
  const T* values() const { return values_.data(); }  // [count] in the order of the pairs

 private:
  int64_t rows_, columns_;
  std::vector<int32_t> group_start_, row_;
  std::vector<T> values_;
};

}  // namespace monet::cpu
