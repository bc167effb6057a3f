#include "sparse_rows.h"

#include <algorithm>
#include <cstring>

#include "tasks.h"

namespace monet::cpu {
namespace {

constexpr int64_t kTaskRows = 64;

// f(column) for the entries of a row that are not 0. Most are: stretches of them are passed over at once.
template <class T, class F>
void for_each_entry(const T* row, int64_t columns, const F& f) {
  constexpr int64_t words = 8, stretch = words * sizeof(uint64_t) / sizeof(T);
  int64_t k = 0;
  for (; k + stretch <= columns; k += stretch) {
    uint64_t bits[words], any = 0;
    std::memcpy(bits, row + k, sizeof bits);
    for (const uint64_t word : bits) any |= word;
    if (any == 0) continue;
    for (int64_t i = k; i < k + stretch; ++i)
      if (row[i] != 0) f(i);
  }
  for (; k < columns; ++k)
    if (row[k] != 0) f(k);
}

}  // namespace

template <class T>
SparseRows<T>::SparseRows(const T* dense, int64_t rows, int64_t columns)
    : rows_(rows), columns_(columns), row_start_(rows + 1, 0) {
  struct Found {
    std::vector<int32_t> column;
    std::vector<T> values;
  };
  const int64_t tasks = ceil_div(rows, kTaskRows);
  std::vector<Found> found(tasks);
  for_each_range(rows, kTaskRows, [&](int64_t begin, int64_t end) {
    Found& here = found[begin / kTaskRows];
    for (int64_t r = begin; r < end; ++r) {
      const T* row = dense + r * columns;
      const size_t before = here.column.size();
      for_each_entry(row, columns, [&](int64_t k) {
        here.column.push_back(static_cast<int32_t>(k));
        here.values.push_back(row[k]);
      });
      row_start_[r + 1] = static_cast<int32_t>(here.column.size() - before);
    }
  });
  for (int64_t r = 0; r < rows; ++r) row_start_[r + 1] += row_start_[r];
  column_.resize(count());
  values_.resize(count());
  for_each_task(tasks, [&](int64_t task) {
    std::copy(found[task].column.begin(), found[task].column.end(), column_.begin() + row_start_[task * kTaskRows]);
    std::copy(found[task].values.begin(), found[task].values.end(), values_.begin() + row_start_[task * kTaskRows]);
  });
}

template <class T>
SparseGroups<T>::SparseGroups(const SparseRows<T>& sparse)
    : rows_(sparse.rows()), columns_(sparse.columns()), group_start_(blocks_of(rows_) * columns_ + 1),
      row_(sparse.count()), values_(sparse.count()) {
  for_each_task(blocks_of(rows_), [&](int64_t block) {
    const int64_t begin = block * kBlockTokens, end = smaller(rows_, begin + kBlockTokens);
    const int32_t first = sparse.row_start()[begin], last = sparse.row_start()[end];
    std::vector<int32_t> next(columns_, 0);
    for (int32_t entry = first; entry < last; ++entry) ++next[sparse.column()[entry]];
    int32_t start = first;
    for (int64_t k = 0; k < columns_; ++k) {
      group_start_[block * columns_ + k] = start;
      start += next[k];
      next[k] = start - next[k];
    }
    for (int64_t r = begin; r < end; ++r)
      for (int32_t entry = sparse.row_start()[r]; entry < sparse.row_start()[r + 1]; ++entry) {
        const int32_t to = next[sparse.column()[entry]]++;
        row_[to] = static_cast<int32_t>(r);
        values_[to] = sparse.values()[entry];
      }
  });
  group_start_.back() = static_cast<int32_t>(sparse.count());
}

template <class T>
Pairs SparseGroups<T>::pairs() const {
  return {
      .tokens = rows_,
      .experts = columns_,
      .count = static_cast<int64_t>(row_.size()),
      .token = row_.data(),
      .group_start = group_start_.data(),
      .row_start = nullptr,
      .row_pair = nullptr};
}

template class SparseRows<float>;
template class SparseRows<double>;
template class SparseGroups<float>;
template class SparseGroups<double>;

}  // namespace monet::cpu
