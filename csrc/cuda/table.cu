// Tables of blocks: which row holds the block of a grid cell, which rows the blocks around each block, and the reverse.
//
//   cells[n, gd, gh, gw]                   row r with index[r] = (n, gd, gh, gw), -1 where no block is stored
//   table[r, column of offset (z, y, x)]   cells[n, gd + z, gh + y, gw + x] for index[r] = (n, gd, gh, gw), -1 outside
//   reverse[table[r, c], columns - 1 - c]  r; -1 where no r has it
//
// Layouts   index [rows, 4], cells [batch, grid], table [rows, prod(2 * radius + 1)], int32. The table may be between
//           two sets of blocks on one grid: index of the written ones, cells of the gathered ones.
// Work      A thread for each number written, 256 in a block. Cells and reverse are filled with -1 first, then a thread
//           for each row or table entry writes its number: no two write one place, as each block is stored once.
// Limits    What index and table hold is not checked.
// Expected  Bound by launches: a few microseconds each for up to some hundred thousand entries. Not measured yet.
#include "cuda/channels.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"

namespace s3d::cuda {
namespace {

constexpr int kThreads = 256;

struct GridView {
  int d, h, w;
};

GridView view(const Triple& t) { return {static_cast<int>(t.d), static_cast<int>(t.h), static_cast<int>(t.w)}; }

__device__ __forceinline__ int64_t thread_number() {
  return int64_t{blockIdx.x} * kThreads + static_cast<int>(threadIdx.x);
}

__device__ __forceinline__ int64_t cell_of(const GridView& grid, int n, int d, int h, int w) {
  return ((int64_t{n} * grid.d + d) * grid.h + h) * grid.w + w;
}

__global__ void __launch_bounds__(kThreads) no_rows_kernel(Global<int32_t> table, int64_t count) {
  const int64_t i = thread_number();
  if (i < count) table[i] = -1;
}

__global__ void __launch_bounds__(kThreads)
    cell_rows_kernel(Global<const int32_t> index, int64_t rows, GridView grid, Global<int32_t> cells) {
  const int64_t row = thread_number();
  if (row >= rows) return;
  const int4 at = load<int4>(index + row * 4);
  cells[cell_of(grid, at.x, at.y, at.z, at.w)] = static_cast<int32_t>(row);
}

__global__ void __launch_bounds__(kThreads)
    neighbour_table_kernel(Global<const int32_t> index, int64_t entries, Global<const int32_t> cells, GridView grid,
                           GridView radius, Global<int32_t> table) {
  const int64_t i = thread_number();
  if (i >= entries) return;
  const int span_d = 2 * radius.d + 1, span_h = 2 * radius.h + 1, span_w = 2 * radius.w + 1;
  const int64_t row = i / (span_d * span_h * span_w);
  const int column = static_cast<int>(i - row * (span_d * span_h * span_w));
  const int4 at = load<int4>(index + row * 4);
  const int d = at.y + column / span_w / span_h - radius.d;
  const int h = at.z + column / span_w % span_h - radius.h;
  const int w = at.w + column % span_w - radius.w;
  int32_t other = -1;
  if (d >= 0 && d < grid.d && h >= 0 && h < grid.h && w >= 0 && w < grid.w) {
    other = cells[cell_of(grid, at.x, d, h, w)];
  }
  table[i] = other;
}

__global__ void __launch_bounds__(kThreads)
    reverse_table_kernel(Global<const int32_t> table, int64_t entries, int columns, Global<int32_t> reverse) {
  const int64_t i = thread_number();
  if (i >= entries) return;
  const int32_t other = table[i];
  if (other < 0) return;
  const int64_t row = i / columns;
  reverse[int64_t{other} * columns + columns - 1 - (i - row * columns)] = static_cast<int32_t>(row);
}

void fill_with_no_rows(int32_t* table, int64_t count, cudaStream_t stream) {
  launch("no_rows", no_rows_kernel, blocks_of(count, kThreads), kThreads, 0, stream, table, count);
}

}  // namespace

void cell_rows(const int32_t* index, int64_t rows, int64_t batch, const Triple& grid, int32_t* cells,
               cudaStream_t stream) {
  fill_with_no_rows(cells, batch * grid.volume(), stream);
  launch("cell_rows", cell_rows_kernel, blocks_of(rows, kThreads), kThreads, 0, stream, index, rows, view(grid), cells);
}

void neighbour_table(const int32_t* index, int64_t rows, const int32_t* cells, const Triple& grid,
                     const Triple& radius, int32_t* table, cudaStream_t stream) {
  const int64_t entries = rows * (2 * radius.d + 1) * (2 * radius.h + 1) * (2 * radius.w + 1);
  launch("neighbour_table", neighbour_table_kernel, blocks_of(entries, kThreads), kThreads, 0, stream, index, entries,
         cells, view(grid), view(radius), table);
}

void reverse_table(const int32_t* table, int64_t rows, int64_t columns, int64_t reverse_rows, int32_t* reverse,
                   cudaStream_t stream) {
  fill_with_no_rows(reverse, reverse_rows * columns, stream);
  launch("reverse_table", reverse_table_kernel, blocks_of(rows * columns, kThreads), kThreads, 0, stream, table,
         rows * columns, static_cast<int>(columns), reverse);
}

}  // namespace s3d::cuda
