// Tables of blocks made on the device are those that the host makes.
#include "cuda/tests/results.h"
#include "tests/problem.h"

namespace s3d::cuda::test {
namespace {

using s3d::test::Layout;
using s3d::test::Random;

// Calls fill(result) with each seed and compares.
template <typename Fill>
void check_table(const char* what, const std::vector<int32_t>& expected, const Fill& fill) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    emulator::set_options({seed, true});
    DeviceBuffer<int32_t> result(expected.size(), what);
    for (size_t i = 0; i < result.size(); ++i) result[i] = -7;
    fill(result.data());
    for (size_t i = 0; i < result.size(); ++i) {
      if (result[i] == expected[i]) continue;
      std::printf("%s: number %zu is %d, not %d\n", what, i, result[i], expected[i]);
      std::exit(1);
    }
  }
  emulator::set_options({});
}

void check_tables(const Layout& written, const Layout& gathered, const Triple& radius) {
  const Triple& grid = written.grid;
  const std::vector<int32_t> table = s3d::test::neighbour_table(written, gathered, radius);
  const int64_t columns = (2 * radius.d + 1) * (2 * radius.h + 1) * (2 * radius.w + 1);
  const std::vector<int32_t> reversed = s3d::reverse_table(table.data(), written.rows, columns, gathered.rows);
  DeviceBuffer<int32_t> written_index(written.index.size()), gathered_index(gathered.index.size());
  DeviceBuffer<int32_t> cells(gathered.row.size()), device_table(table.size());
  std::copy(written.index.begin(), written.index.end(), written_index.data());
  std::copy(gathered.index.begin(), gathered.index.end(), gathered_index.data());
  std::copy(gathered.row.begin(), gathered.row.end(), cells.data());
  std::copy(table.begin(), table.end(), device_table.data());
  check_table("cell_rows", gathered.row, [&](int32_t* result) {
    cell_rows(gathered_index.data(), gathered.rows, gathered.batch, grid, result, nullptr);
  });
  check_table("neighbour_table", table, [&](int32_t* result) {
    neighbour_table(written_index.data(), written.rows, cells.data(), grid, radius, result, nullptr);
  });
  check_table("reverse_table", reversed, [&](int32_t* result) {
    reverse_table(device_table.data(), written.rows, columns, gathered.rows, result, nullptr);
  });
}

}  // namespace

void test_table() {
  struct Case {
    Triple grid, radius;
    std::vector<double> written, gathered;  // share of the blocks of each sample
  };
  const Case cases[] = {{{3, 4, 5}, {1, 1, 1}, {0.5, 0, 1}, {0.7, 0.3, 0.2}},
                        {{7, 2, 6}, {2, 0, 1}, {0.4, 0.6}, {1, 1}},
                        {{2, 2, 2}, {0, 0, 0}, {0.8}, {0.5}},
                        {{2, 2, 2}, {3, 1, 2}, {1}, {1}},
                        {{2, 3, 2}, {1, 1, 1}, {0, 0}, {0.5, 0}},
                        {{2, 3, 2}, {1, 1, 1}, {0.5, 0}, {0, 0}},
                        {{1, 1, 1}, {1, 1, 1}, {}, {}}};
  uint64_t seed = 300;
  for (const Case& c : cases) {
    Random random(++seed);
    const auto batch = static_cast<int64_t>(c.written.size());
    const Layout written(batch, c.grid, c.written, random), gathered(batch, c.grid, c.gathered, random);
    check_tables(written, gathered, c.radius);
    check_tables(written, written, c.radius);
  }
}

}  // namespace s3d::cuda::test
