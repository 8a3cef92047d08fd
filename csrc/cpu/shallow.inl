// Convolution of few channels, as in the stem: the inputs of a voxel under all taps are one short line. Taken tap by tap,
// sums would be loaded and stored for one multiplication each; so the lines of a tile are copied together, in the L1 cache,
// and multiplied as a matrix. Included once per instruction set, inside its namespace, after conv.inl.

// lines[channel, tap, voxel] of the rows [first, last), `stride` voxels apart: zero where a voxel and a tap are no pair.
template <typename T>
inline void gather_lines(const Window& window, const Pairs& pairs, int64_t first, int64_t last, const T* x,
                         int64_t channels, int64_t depth, T* lines, int64_t stride) {
  const int64_t taps = window.taps(), before = first * window.written_block.w;
  const bool all = window.written_voxels == nullptr && window.gathered_voxels == nullptr;
  std::fill_n(lines, depth * taps * stride, T(0));
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      T* line = lines + (k * taps + tap) * stride;
      pairs.for_each_run(tap, first, last, [&](int64_t from, int64_t to, const Run& run) {
        const T* values = x + from * channels + k;
        if (all && channels == 1 && run.local_step == 1 && run.step == 1) {
          std::copy_n(values, run.count, line + to);
          return;
        }
        for (int64_t i = 0; i < run.count; ++i) {
          if (!all && !pairs.is_pair(from + i * run.local_step, before + to + i * run.step)) continue;
          line[to + i * run.step] = values[i * run.local_step * channels];
        }
      });
    }
  }
}

// sums[voxel, NR] += lines[k, voxel] * weights[k, NR] for M voxels.
template <typename T, int M>
inline void multiply_lines(const T* lines, int64_t stride, int64_t depth, const T* weights, T* sums) {
  constexpr int64_t lanes = Vector<T>::lanes, panel = Vector<T>::panel;
  typename Vector<T>::type sum[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    sum[i][0] = load(sums + i * panel);
    sum[i][1] = load(sums + i * panel + lanes);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const auto low = load(weights + k * panel), high = load(weights + k * panel + lanes);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const T value = lines[k * stride + i];
      sum[i][0] += value * low;
      sum[i][1] += value * high;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    store(sums + i * panel, sum[i][0]);
    store(sums + i * panel + lanes, sum[i][1]);
  }
}

// sums[m, NR] += lines[m, voxel] * grads[voxel, NR] over the voxels, for M lines.
template <typename T, int M>
inline void correlate_lines(const T* lines, int64_t stride, int64_t voxels, const T* grads, T* sums) {
  constexpr int64_t lanes = Vector<T>::lanes, panel = Vector<T>::panel;
  typename Vector<T>::type sum[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = typename Vector<T>::type{};
  for (int64_t v = 0; v < voxels; ++v) {
    const auto low = load(grads + v * panel), high = load(grads + v * panel + lanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const T value = lines[m * stride + v];
      sum[m][0] += value * low;
      sum[m][1] += value * high;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    // Added tile by tile, so that rounding errors do not grow with the volume.
    store(sums + m * panel, load(sums + m * panel) + sum[m][0]);
    store(sums + m * panel + lanes, load(sums + m * panel + lanes) + sum[m][1]);
  }
}

// Voxels of a tile, up to whole groups of rows, and such that lines do not fall on the same lines of the cache.
inline int64_t padded_tile(int64_t voxels) {
  return (voxels + REGISTER_ROWS - 1) / REGISTER_ROWS * REGISTER_ROWS + 16;
}

template <typename T>
void conv3d_shallow(const Window& window, const T* gathered, const T* weight, const T* bias, T* written,
                    int64_t in_channels, int64_t out_channels, int64_t groups, int threads) {
  constexpr int64_t panel = Vector<T>::panel;
  const Locator locator(window);
  const int64_t in_group = in_channels / groups, out_group = out_channels / groups;
  const int64_t line = in_group * window.taps(), width = window.written_block.w;
  const int64_t panels = (out_group + panel - 1) / panel, all_panels = panels * groups;
  const int64_t rows = window.written_rows * window.written_block.d * window.written_block.h;
  const int64_t tile = rows_per_tile(window), tiles = (rows + tile - 1) / tile;
  AlignedBuffer<T> packed(all_panels * line * panel);  // [group, panel, channel, tap, NR]
  for (int64_t item = 0; item < all_panels; ++item) {
    const int64_t out = item / panels * out_group + item % panels * panel;
    const int64_t filled = std::min(panel, out_group - item % panels * panel);
    for (int64_t k = 0; k < line; ++k) {
      T* to = packed.data + (item * line + k) * panel;
      for (int64_t j = 0; j < panel; ++j) to[j] = j < filled ? weight[(out + j) * line + k] : T(0);
    }
  }
  const int64_t stride = padded_tile(tile * width);
  const BufferPerThread<T> all_lines(threads, line * stride), all_sums(threads, stride * panel);
  const Pairs pairs(window, locator, 0);
#pragma omp parallel num_threads(threads)
  {
    T *lines = all_lines.mine(), *sums = all_sums.mine();
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = t * tile, last = std::min(rows, first + tile), voxels = (last - first) * width;
      const uint8_t* visible = window.written_voxels == nullptr ? nullptr : window.written_voxels + first * width;
      for (int64_t group = 0; group < groups; ++group) {
        gather_lines(window, pairs, first, last, gathered + group * in_group, in_channels, in_group, lines, stride);
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t filled = std::min(panel, out_group - p * panel), channel = group * out_group + p * panel;
          start_sums(bias == nullptr ? nullptr : bias + channel, filled, stride, sums);
          for (int64_t v = 0; v < voxels; v += REGISTER_ROWS) {
            multiply_lines<T, REGISTER_ROWS>(lines + v, stride, line, packed.data + (group * panels + p) * line * panel,
                                             sums + v * panel);
          }
          write_sums(sums, visible, filled, voxels, written + first * width * out_channels + channel, out_channels);
        }
      }
    }
  }
}

template <typename T>
void conv3d_grad_weight_shallow(const Window& window, const T* grad, const T* x, T* grad_weight, int64_t in_channels,
                                int64_t out_channels, int64_t groups, int threads) {
  constexpr int64_t panel = Vector<T>::panel;
  const Locator locator(window);
  const int64_t in_group = in_channels / groups, out_group = out_channels / groups;
  const int64_t line = in_group * window.taps(), width = window.written_block.w;
  const int64_t panels = (out_group + panel - 1) / panel;
  const int64_t rows = window.written_rows * window.written_block.d * window.written_block.h;
  const int64_t tile = rows_per_tile(window), tiles = (rows + tile - 1) / tile;
  // Lines beyond the last are zeros. Tiles are cut into parts that depend on the problem alone, so that results do not
  // depend on the threads.
  const int64_t padded = (line + REGISTER_ROWS - 1) / REGISTER_ROWS * REGISTER_ROWS, stride = padded_tile(tile * width);
  const int64_t size = groups * panels * padded * panel;
  const int64_t budget = (int64_t(32) << 20) / static_cast<int64_t>(size * sizeof(T));
  const int64_t parts = std::clamp<int64_t>(tiles / 16, 1, std::clamp<int64_t>(budget, 1, 64));
  AlignedBuffer<T> sums(parts * size);  // [part, group, panel, channel and tap, NR]
  const BufferPerThread<T> all_lines(threads, padded * stride), all_grads(threads, tile * width * panel);
  const Pairs pairs(window, locator, 0);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t part = 0; part < parts; ++part) {
    T *lines = all_lines.mine(), *grads = all_grads.mine(), *total = sums.data + part * size;
    std::fill_n(total, size, T(0));
    std::fill_n(lines, padded * stride, T(0));
    for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t) {
      const int64_t first = t * tile, last = std::min(rows, first + tile), voxels = (last - first) * width;
      for (int64_t group = 0; group < groups; ++group) {
        gather_lines(window, pairs, first, last, x + group * in_group, in_channels, in_group, lines, stride);
        for (int64_t p = 0; p < panels; ++p) {
          // What lies at masked voxels must not be multiplied, not even by zero: it may be NaN.
          const int64_t filled = std::min(panel, out_group - p * panel);
          for (int64_t v = 0; v < voxels; ++v) {
            const T* from = grad + (first * width + v) * out_channels + group * out_group + p * panel;
            const bool visible = window.written_voxels == nullptr || window.written_voxels[first * width + v];
            for (int64_t j = 0; j < panel; ++j) grads[v * panel + j] = visible && j < filled ? from[j] : T(0);
          }
          for (int64_t m = 0; m < padded; m += REGISTER_ROWS) {
            correlate_lines<T, REGISTER_ROWS>(lines + m * stride, stride, voxels, grads,
                                              total + ((group * panels + p) * padded + m) * panel);
          }
        }
      }
    }
  }
  for (int64_t o = 0; o < out_channels; ++o) {
    const int64_t group = o / out_group, p = o % out_group / panel, j = o % out_group % panel;
    for (int64_t k = 0; k < line; ++k) {
      const T* from = sums.data + ((group * panels + p) * padded + k) * panel + j;
      T value = from[0];
      for (int64_t part = 1; part < parts; ++part) value += from[part * size];
      grad_weight[o * line + k] = value;
    }
  }
}
