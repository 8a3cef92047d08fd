// Convolution where voxels are few. At the lowest resolutions a weight is megabytes and the voxels are a handful, so that
// bringing the weight into another order costs more than multiplying by it. Here it is read once, as torch lays it out (row
// o: [in_channels / groups, taps]), and the voxels are brought into its order instead. Included once per instruction set,
// inside its namespace, after conv.inl.

// source[voxel, tap]: the gathered voxel of a written voxel under a tap, -1 where they are no pair.
inline std::vector<int64_t> sources_by_voxel(const Window& window) {
  const int64_t taps = window.taps(), voxels = window.written_rows * window.written_block.volume();
  const int64_t rows = window.written_rows * window.written_block.d * window.written_block.h;
  const Locator locator(window);
  Pairs pairs(window, locator, voxels);
  std::vector<int64_t> source(voxels * taps, -1);
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t count = pairs.list(tap, 0, rows, 0);
    for (int64_t i = 0; i < count; ++i) source[pairs.target[i] * taps + tap] = pairs.source[i];
  }
  return source;
}

// columns[voxel, channel, tap]: what a written voxel gathers under each tap; zero where they are no pair.
template <typename T>
void gather_columns(const std::vector<int64_t>& source, int64_t taps, const T* x, int64_t stride, int64_t depth,
                    T* columns, int threads) {
  const int64_t voxels = static_cast<int64_t>(source.size()) / taps;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int64_t v = 0; v < voxels; ++v) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t from = source[v * taps + tap];
        columns[(v * depth + k) * taps + tap] = from < 0 ? T(0) : x[from * stride + k];
      }
    }
  }
}

template <typename T>
inline T sum_of_lanes(typename Vector<T>::type v) {
  T total = 0;
  for (int64_t i = 0; i < Vector<T>::lanes; ++i) total += v[i];
  return total;
}

// sums[v, o] += columns[v] . weight[o] for O weight rows and V voxels, over a strip of their length.
template <typename T, int O, int V>
inline void dot_rows(const T* weight, const T* columns, int64_t row, int64_t count, T* sums, int64_t sums_stride) {
  constexpr int64_t lanes = Vector<T>::lanes;
  typename Vector<T>::type sum[O][V];
#pragma GCC unroll 4
  for (int o = 0; o < O; ++o) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[o][v] = typename Vector<T>::type{};
  }
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    typename Vector<T>::type column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = load(columns + v * row + i);
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) {
      const auto factor = load(weight + o * row + i);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[o][v] += factor * column[v];
    }
  }
  for (int o = 0; o < O; ++o) {
    for (int v = 0; v < V; ++v) {
      T total = sum_of_lanes<T>(sum[o][v]);
      for (int64_t j = i; j < count; ++j) total += weight[o * row + j] * columns[v * row + j];
      sums[v * sums_stride + o] += total;
    }
  }
}

template <typename T, int O>
inline void dot_voxels(const T* weight, const T* columns, int64_t row, int64_t count, int64_t voxels, T* sums,
                       int64_t sums_stride) {
  int64_t v = 0;
  for (; v + 3 <= voxels; v += 3) {
    dot_rows<T, O, 3>(weight, columns + v * row, row, count, sums + v * sums_stride, sums_stride);
  }
  for (; v < voxels; ++v) {
    dot_rows<T, O, 1>(weight, columns + v * row, row, count, sums + v * sums_stride, sums_stride);
  }
}

// Weight rows that are a work item: few enough for all threads, enough that a strip of columns is used often.
constexpr int64_t kRowsOfItem = 32;

// A strip of `voxels` columns that stays in the cache.
template <typename T>
int64_t strip_of_columns(int64_t voxels) {
  constexpr int64_t panel = Vector<T>::panel;
  return std::max<int64_t>((int64_t(48) << 10) / static_cast<int64_t>(sizeof(T)) / voxels / panel, 8) * panel;
}

template <typename T>
void conv3d_few_forward(const Window& window, const T* gathered, const T* weight, const T* bias, T* written,
                        int64_t in_channels, int64_t out_channels, int64_t groups, int threads) {
  const std::vector<int64_t> source = sources_by_voxel(window);
  const int64_t taps = window.taps(), voxels = static_cast<int64_t>(source.size()) / taps;
  const int64_t in_group = in_channels / groups, out_group = out_channels / groups, row = in_group * taps;
  const int64_t items = (out_group + kRowsOfItem - 1) / kRowsOfItem, strip = strip_of_columns<T>(voxels);
  AlignedBuffer<T> columns(voxels * row);
  const BufferPerThread<T> all_sums(threads, voxels * kRowsOfItem);
  for (int64_t group = 0; group < groups; ++group) {
    gather_columns(source, taps, gathered + group * in_group, in_channels, in_group, columns.data, threads);
#pragma omp parallel num_threads(threads)
    {
      T* sums = all_sums.mine();
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < items; ++item) {
        const int64_t first = item * kRowsOfItem, count = std::min(kRowsOfItem, out_group - first);
        const T* rows = weight + (group * out_group + first) * row;
        std::fill_n(sums, voxels * kRowsOfItem, T(0));
        for (int64_t begin = 0; begin < row; begin += strip) {
          const int64_t length = std::min(strip, row - begin);
          int64_t o = 0;
          for (; o + 4 <= count; o += 4) {
            dot_voxels<T, 4>(rows + o * row + begin, columns.data + begin, row, length, voxels, sums + o, kRowsOfItem);
          }
          for (; o < count; ++o) {
            dot_voxels<T, 1>(rows + o * row + begin, columns.data + begin, row, length, voxels, sums + o, kRowsOfItem);
          }
        }
        for (int64_t v = 0; v < voxels; ++v) {
          const bool visible = window.written_voxels == nullptr || window.written_voxels[v];
          const int64_t channel = group * out_group + first;
          for (int64_t o = 0; o < count; ++o) {
            const T start = bias != nullptr ? bias[channel + o] : T(0);
            written[v * out_channels + channel + o] = visible ? start + sums[v * kRowsOfItem + o] : T(0);
          }
        }
      }
    }
  }
}

// products[v] += sum over O weight rows of x[v, o] * weight[o], over a strip of their length.
template <typename T, int O>
inline void scale_rows(const T* weight, int64_t row, int64_t count, const T* x, int64_t x_stride, int64_t voxels,
                       T* products) {
  constexpr int64_t lanes = Vector<T>::lanes;
  int64_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    typename Vector<T>::type low[O], high[O];
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) {
      low[o] = load(weight + o * row + i);
      high[o] = load(weight + o * row + i + lanes);
    }
    for (int64_t v = 0; v < voxels; ++v) {
      T* product = products + v * row + i;
      auto sum_low = load(product), sum_high = load(product + lanes);
#pragma GCC unroll 4
      for (int o = 0; o < O; ++o) {
        const T value = x[v * x_stride + o];
        sum_low += value * low[o];
        sum_high += value * high[o];
      }
      store(product, sum_low);
      store(product + lanes, sum_high);
    }
  }
  for (; i < count; ++i) {
    for (int64_t v = 0; v < voxels; ++v) {
      for (int o = 0; o < O; ++o) products[v * row + i] += x[v * x_stride + o] * weight[o * row + i];
    }
  }
}

template <typename T>
void conv3d_few_transposed(const Window& window, const T* gathered, const T* weight, const T* bias, T* written,
                           int64_t in_channels, int64_t out_channels, int64_t groups, int threads) {
  const std::vector<int64_t> source = sources_by_voxel(window);
  const int64_t taps = window.taps(), voxels = static_cast<int64_t>(source.size()) / taps;
  const int64_t others = window.gathered_rows * window.gathered_block.volume();
  const int64_t in_group = in_channels / groups, out_group = out_channels / groups, row = in_group * taps;
  // Strips as long as the weight's pages reward, but several for each thread; their length changes no result.
  const int64_t strip = std::clamp<int64_t>(row / (4 * threads) / 64 * 64, 64, 1024);
  const int64_t strips = (row + strip - 1) / strip;
  AlignedBuffer<T> products(others * row);
  for (int64_t group = 0; group < groups; ++group) {
    const T* x = gathered + group * out_group;
    const T* rows = weight + group * out_group * row;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
      for (int64_t s = 0; s < strips; ++s) {
        const int64_t begin = s * strip, length = std::min(strip, row - begin);
        for (int64_t v = 0; v < others; ++v) std::fill_n(products.data + v * row + begin, length, T(0));
        int64_t o = 0;
        for (; o + 4 <= out_group; o += 4) {
          scale_rows<T, 4>(rows + o * row + begin, row, length, x + o, out_channels, others, products.data + begin);
        }
        for (; o < out_group; ++o) {
          scale_rows<T, 1>(rows + o * row + begin, row, length, x + o, out_channels, others, products.data + begin);
        }
      }
#pragma omp for schedule(static)
      for (int64_t v = 0; v < voxels; ++v) {
        const bool visible = window.written_voxels == nullptr || window.written_voxels[v];
        T* out = written + v * in_channels + group * in_group;
        for (int64_t k = 0; k < in_group; ++k) out[k] = bias != nullptr && visible ? bias[group * in_group + k] : T(0);
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t from = source[v * taps + tap];
          if (from < 0) continue;
          const T* product = products.data + from * row + tap;
          for (int64_t k = 0; k < in_group; ++k) out[k] += product[k * taps];
        }
      }
    }
  }
}

// grad_weight[o] = sum over voxels of grad[v, o] * columns[v] for O weight rows, over a strip of their length.
template <typename T, int O>
inline void combine_rows(const T* grad, int64_t grad_stride, const T* columns, int64_t row, int64_t count,
                         int64_t voxels, T* grad_weight) {
  constexpr int64_t lanes = Vector<T>::lanes;
  int64_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    typename Vector<T>::type low[O], high[O];
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) low[o] = high[o] = typename Vector<T>::type{};
    for (int64_t v = 0; v < voxels; ++v) {
      const auto column_low = load(columns + v * row + i), column_high = load(columns + v * row + i + lanes);
#pragma GCC unroll 4
      for (int o = 0; o < O; ++o) {
        const T value = grad[v * grad_stride + o];
        low[o] += value * column_low;
        high[o] += value * column_high;
      }
    }
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) {
      store(grad_weight + o * row + i, low[o]);
      store(grad_weight + o * row + i + lanes, high[o]);
    }
  }
  for (; i < count; ++i) {
    for (int o = 0; o < O; ++o) {
      T total = 0;
      for (int64_t v = 0; v < voxels; ++v) total += grad[v * grad_stride + o] * columns[v * row + i];
      grad_weight[o * row + i] = total;
    }
  }
}

template <typename T>
void conv3d_grad_weight_few(const Window& window, const T* grad, const T* x, T* grad_weight, int64_t in_channels,
                            int64_t out_channels, int64_t groups, int threads) {
  const std::vector<int64_t> source = sources_by_voxel(window);
  const int64_t taps = window.taps(), voxels = static_cast<int64_t>(source.size()) / taps;
  const int64_t in_group = in_channels / groups, out_group = out_channels / groups, row = in_group * taps;
  const int64_t items = (out_group + kRowsOfItem - 1) / kRowsOfItem, strip = strip_of_columns<T>(voxels);
  AlignedBuffer<T> columns(voxels * row);
  // What lies at masked voxels must not be multiplied, not even by zero: it may be NaN.
  std::vector<T> visible(grad, grad + voxels * out_channels);
  for (int64_t v = 0; window.written_voxels != nullptr && v < voxels; ++v) {
    if (!window.written_voxels[v]) std::fill_n(visible.data() + v * out_channels, out_channels, T(0));
  }
  for (int64_t group = 0; group < groups; ++group) {
    gather_columns(source, taps, x + group * in_group, in_channels, in_group, columns.data, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t first = group * out_group + item * kRowsOfItem;
      const int64_t last = std::min(first + kRowsOfItem, (group + 1) * out_group);
      for (int64_t begin = 0; begin < row; begin += strip) {
        const int64_t length = std::min(strip, row - begin);
        int64_t o = first;
        for (; o + 4 <= last; o += 4) {
          combine_rows<T, 4>(visible.data() + o, out_channels, columns.data + begin, row, length, voxels,
                             grad_weight + o * row + begin);
        }
        for (; o < last; ++o) {
          combine_rows<T, 1>(visible.data() + o, out_channels, columns.data + begin, row, length, voxels,
                             grad_weight + o * row + begin);
        }
      }
    }
  }
}
