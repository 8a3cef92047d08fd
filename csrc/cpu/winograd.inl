// Winograd convolution F(2x2x2, 3x3x3) for stride 1: a tile of 2x2x2 outputs from 4x4x4 inputs with 64 multiplications
// per pair of channels instead of 216 (Lavin and Gray, CVPR 2016, nested over three axes). Missing neighbours and masked
// voxels are zeros. Included once per instruction set, inside its namespace, after conv.inl.

constexpr int kPoints = 64;

// Tiles of one chunk: their transformed inputs and products stay in the L2 cache.
constexpr int64_t kChunkTiles = 24;

// A distance between the points of a buffer at which they do not all fall on the same lines of the cache.
inline int64_t spread(int64_t size) { return (size + 15) / 16 * 16 + 16; }

// Along one axis, in place, `step` apart: [d0 - d2, d1 + d2, d2 - d1, d1 - d3].
template <typename V>
inline void transform_input_axis(V* t, int step) {
  const V a = t[0] - t[2 * step], b = t[step] + t[2 * step], c = t[2 * step] - t[step], d = t[step] - t[3 * step];
  t[0] = a;
  t[step] = b;
  t[2 * step] = c;
  t[3 * step] = d;
}

// Four products to two outputs: [m0 + m1 + m2, m1 - m2 - m3].
template <typename V>
inline void transform_output_axis(const V* m, int step, V* low, V* high) {
  *low = m[0] + m[step] + m[2 * step];
  *high = m[step] - m[2 * step] - m[3 * step];
}

// Three weights to four: [g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2].
template <typename V>
inline void transform_weight_axis(const V* g, int step, V* t, int t_step) {
  const V sum = (g[0] + g[2 * step]) * 0.5f, middle = g[step] * 0.5f;
  t[0] = g[0];
  t[t_step] = sum + middle;
  t[2 * t_step] = sum - middle;
  t[3 * t_step] = g[2 * step];
}

// packed [27, panel, k, NR] -> [64, panel, k, NR]. The transposed convolution correlates with flipped taps.
template <typename T>
void transform_weights(const T* packed, bool flipped, int64_t panels, int64_t depth, T* points, int threads) {
  constexpr int64_t lanes = Vector<T>::lanes;
  using V = typename Vector<T>::type;
  const int64_t vectors = panels * depth * 2, stride = vectors * lanes;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < vectors; ++i) {
    V g[27], a[36], b[48], t[64];
    for (int tap = 0; tap < 27; ++tap) g[tap] = load(packed + (flipped ? 26 - tap : tap) * stride + i * lanes);
    for (int zy = 0; zy < 9; ++zy) transform_weight_axis(g + zy * 3, 1, a + zy * 4, 1);           // [3, 3, 4]
    for (int z = 0; z < 3; ++z) {
      for (int x = 0; x < 4; ++x) transform_weight_axis(a + z * 12 + x, 4, b + z * 16 + x, 4);    // [3, 4, 4]
    }
    for (int yx = 0; yx < 16; ++yx) transform_weight_axis(b + yx, 16, t + yx, 16);                // [4, 4, 4]
    for (int point = 0; point < kPoints; ++point) store(points + point * stride + i * lanes, t[point]);
  }
}

// y [count, y_stride] (one panel) = x [count, depth] * weights [depth, NR] for M rows.
template <typename T, int M>
inline void product_group(const T* x, int64_t depth, const T* weights, T* y, int64_t y_stride) {
  constexpr int64_t lanes = Vector<T>::lanes, panel = Vector<T>::panel;
  typename Vector<T>::type sum[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) sum[i][0] = sum[i][1] = typename Vector<T>::type{};
  for (int64_t k = 0; k < depth; ++k) {
    const auto low = load(weights + k * panel), high = load(weights + k * panel + lanes);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const T value = x[i * depth + k];
      sum[i][0] += value * low;
      sum[i][1] += value * high;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    store(y + i * y_stride, sum[i][0]);
    store(y + i * y_stride + lanes, sum[i][1]);
  }
}

template <typename T, int M>
inline void product_rest(int64_t count, const T* x, int64_t depth, const T* weights, T* y, int64_t y_stride) {
  if constexpr (M > 0) {
    if (count == M) return product_group<T, M>(x, depth, weights, y, y_stride);
    product_rest<T, M - 1>(count, x, depth, weights, y, y_stride);
  }
}

// Whether Winograd's form applies: 3x3x3, stride 1, padding 1, even blocks.
inline bool winograd_applies(const Window& w) {
  for (int axis = 0; axis < 3; ++axis) {
    if (w.kernel[axis] != 3 || w.stride[axis] != 1 || w.padding[axis] != 1 || w.written_block[axis] % 2) return false;
  }
  return true;
}

// The tiles of all blocks, in order: where their inputs lie.
struct Tiles {
  explicit Tiles(const Window& window) : w(window), locator(window) {
    counts = {w.written_block.d / 2, w.written_block.h / 2, w.written_block.w / 2};
    total = w.written_rows * counts.volume();
  }

  // The block of a tile and its first output voxel in it.
  void place(int64_t tile, int64_t& block, int64_t& z, int64_t& y, int64_t& x) const {
    x = tile % counts.w * 2;
    tile /= counts.w;
    y = tile % counts.h * 2;
    tile /= counts.h;
    z = tile % counts.d * 2;
    block = tile / counts.d;
  }

  // The gathered voxel of each of the 4x4x4 inputs, -1 where there is none.
  void inputs(int64_t tile, int64_t* voxels) const {
    int64_t block, first[3];
    place(tile, block, first[0], first[1], first[2]);
    Source at[3][4];
    for (int axis = 0; axis < 3; ++axis) {
      for (int j = 0; j < 4; ++j) {
        const int tap = std::min(j, 2);
        at[axis][j] = locator.at(axis, w.transposed ? 2 - tap : tap, first[axis] + (j > 2));
      }
    }
    const int32_t* table = w.table + block * w.columns();
    const int64_t span_h = 2 * w.radius.h + 1, span_w = 2 * w.radius.w + 1;
    const Triple side = w.gathered_block;
    for (int i = 0; i < kPoints; ++i) {
      const Source z = at[0][i / 16], y = at[1][i / 4 % 4], x = at[2][i % 4];
      const int64_t other = table[(z.block * span_h + y.block) * span_w + x.block];
      voxels[i] = other < 0 ? -1 : ((other * side.d + z.local) * side.h + y.local) * side.w + x.local;
      if (other >= 0 && w.gathered_voxels != nullptr && !w.gathered_voxels[voxels[i]]) voxels[i] = -1;
    }
  }

  // The written voxel of each of the 2x2x2 outputs.
  void outputs(int64_t tile, int64_t* voxels) const {
    int64_t block, z, y, x;
    place(tile, block, z, y, x);
    const Triple side = w.written_block;
    for (int i = 0; i < 8; ++i) {
      voxels[i] = ((block * side.d + z + i / 4) * side.h + y + i / 2 % 2) * side.w + x + i % 2;
    }
  }

  const Window& w;
  Locator locator;
  Triple counts;
  int64_t total;
};

// Transformed inputs of one tile: out[point * stride + c] for channels [0, depth).
template <typename T>
inline void transform_inputs(const int64_t* voxels, const T* x, int64_t x_stride, int64_t depth, T* out, int64_t stride) {
  constexpr int64_t lanes = Vector<T>::lanes;
  using V = typename Vector<T>::type;
  alignas(64) T rest[kPoints * lanes];
  for (int64_t c = 0; c < depth; c += lanes) {
    const bool whole = c + lanes <= depth;
    if (!whole) {
      std::fill_n(rest, kPoints * lanes, T(0));
      for (int i = 0; i < kPoints; ++i) {
        if (voxels[i] >= 0) std::copy_n(x + voxels[i] * x_stride + c, depth - c, rest + i * lanes);
      }
    }
    V t[kPoints];
    for (int yx = 0; yx < 16; ++yx) {
      V column[4];
#pragma GCC unroll 4
      for (int z = 0; z < 4; ++z) {
        const int i = z * 16 + yx;
        column[z] = !whole ? load(rest + i * lanes) : voxels[i] < 0 ? V{} : load(x + voxels[i] * x_stride + c);
      }
      transform_input_axis(column, 1);
#pragma GCC unroll 4
      for (int z = 0; z < 4; ++z) t[z * 16 + yx] = column[z];
    }
    for (int z = 0; z < 4; ++z) {
      V plane[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) plane[i] = t[z * 16 + i];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) transform_input_axis(plane + i, 4);
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) transform_input_axis(plane + y * 4, 1);
      T* to = out + z * 16 * stride + c;
      if (whole) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) store(to + i * stride, plane[i]);
      } else {
        for (int i = 0; i < 16; ++i) {
          store(rest + (z * 16 + i) * lanes, plane[i]);
          std::copy_n(rest + (z * 16 + i) * lanes, depth - c, to + i * stride);
        }
      }
    }
  }
}

template <typename T>
void conv3d_winograd(const Window& window, const T* gathered, const T* weight, const T* bias, T* written,
                     int64_t in_channels, int64_t out_channels, int threads) {
  constexpr int64_t panel = Vector<T>::panel, lanes = Vector<T>::lanes;
  using V = typename Vector<T>::type;
  const int64_t depth = window.transposed ? out_channels : in_channels;
  const int64_t wide = window.transposed ? in_channels : out_channels;
  const int64_t panels = (wide + panel - 1) / panel, padded = panels * panel, size = panels * depth * panel;
  AlignedBuffer<T> packed(27 * size), points(kPoints * size);
  pack_weights(weight, window.transposed, 27, in_channels, out_channels, packed.data, threads);
  transform_weights(packed.data, window.transposed, panels, depth, points.data, threads);
  const Tiles tiles(window);
  // Whole groups of rows, and work for all threads; a result does not depend on how tiles are cut into chunks.
  const int64_t even = (tiles.total / (4 * threads) + REGISTER_ROWS - 1) / REGISTER_ROWS * REGISTER_ROWS;
  const int64_t chunk = std::clamp<int64_t>(even, REGISTER_ROWS, kChunkTiles);
  const int64_t chunks = (tiles.total + chunk - 1) / chunk;
  const int64_t input_stride = spread(chunk * depth), product_stride = spread(chunk * padded);
  const BufferPerThread<T> all_inputs(threads, kPoints * input_stride), all_products(threads, kPoints * product_stride);
#pragma omp parallel num_threads(threads)
  {
    T *inputs = all_inputs.mine(), *products = all_products.mine();
    int64_t voxels[kPoints];
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < chunks; ++part) {
      const int64_t first = part * chunk, count = std::min(chunk, tiles.total - first);
      for (int64_t i = 0; i < count; ++i) {
        tiles.inputs(first + i, voxels);
        transform_inputs(voxels, gathered, depth, depth, inputs + i * depth, input_stride);
      }
      for (int point = 0; point < kPoints; ++point) {
        const T* x = inputs + point * input_stride;
        T* y = products + point * product_stride;
        for (int64_t p = 0; p < panels; ++p) {
          const T* weights = points.data + point * size + p * depth * panel;
          int64_t i = 0;
          for (; i + REGISTER_ROWS <= count; i += REGISTER_ROWS) {
            product_group<T, REGISTER_ROWS>(x + i * depth, depth, weights, y + i * padded + p * panel, padded);
          }
          product_rest<T, REGISTER_ROWS - 1>(count - i, x + i * depth, depth, weights, y + i * padded + p * panel, padded);
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        tiles.outputs(first + i, voxels);
        const T* products_of = products + i * padded;
        for (int64_t c = 0; c < wide; c += lanes) {
          V a[32], y[8];
          for (int yx = 0; yx < 16; ++yx) {
            V m[4];
#pragma GCC unroll 4
            for (int z = 0; z < 4; ++z) m[z] = load(products_of + (z * 16 + yx) * product_stride + c);
            transform_output_axis(m, 1, a + yx, a + 16 + yx);  // [2, 4, 4]
          }
          for (int z = 0; z < 2; ++z) {
            V b[8];
#pragma GCC unroll 4
            for (int x = 0; x < 4; ++x) transform_output_axis(a + z * 16 + x, 4, b + x, b + 4 + x);  // [2, 4]
#pragma GCC unroll 2
            for (int row = 0; row < 2; ++row) {
              transform_output_axis(b + row * 4, 1, y + z * 4 + row * 2, y + z * 4 + row * 2 + 1);
            }
          }
          const int64_t filled = std::min(lanes, wide - c);
          alignas(64) T line[lanes];
          for (int j = 0; j < 8; ++j) {
            T* out = written + voxels[j] * wide + c;
            if (window.written_voxels != nullptr && !window.written_voxels[voxels[j]]) {
              std::fill_n(out, filled, T(0));
            } else if (filled == lanes) {
              store(out, bias == nullptr ? y[j] : y[j] + load(bias + c));
            } else {
              store(line, y[j]);
              for (int64_t l = 0; l < filled; ++l) out[l] = bias == nullptr ? line[l] : line[l] + bias[c + l];
            }
          }
        }
      }
    }
  }
}

// The transpose of the output transform: two gradients to four, [g0, g0 + g1, g0 - g1, -g1].
template <typename V>
inline void spread_output_axis(const V low, const V high, V* m, int step) {
  m[0] = low;
  m[step] = low + high;
  m[2 * step] = low - high;
  m[3 * step] = -high;
}

// The transpose of the weight transform: four to three.
template <typename V>
inline void gather_weight_axis(const V* t, int t_step, V* g, int step) {
  const V sum = (t[t_step] + t[2 * t_step]) * 0.5f;
  g[0] = t[0] + sum;
  g[step] = (t[t_step] - t[2 * t_step]) * 0.5f;
  g[2 * step] = sum + t[3 * t_step];
}

// The 16 points of one plane (depth) of transformed inputs: out[i * stride + c], with c up to `depth`.
template <typename T>
inline void transform_inputs_plane(const int64_t* voxels, int plane, const T* x, int64_t depth, T* out, int64_t stride) {
  constexpr int64_t lanes = Vector<T>::lanes;
  using V = typename Vector<T>::type;
  // d0 - d2, d1 + d2, d2 - d1, d1 - d3.
  static const int first[4] = {0, 1, 2, 1}, second[4] = {2, 2, 1, 3};
  const int64_t *a = voxels + first[plane] * 16, *b = voxels + second[plane] * 16;
  alignas(64) T rest[2 * lanes];
  for (int64_t c = 0; c < depth; c += lanes) {
    const bool whole = c + lanes <= depth;
    V points[16];
    for (int i = 0; i < 16; ++i) {
      V left{}, right{};
      if (whole) {
        if (a[i] >= 0) left = load(x + a[i] * depth + c);
        if (b[i] >= 0) right = load(x + b[i] * depth + c);
      } else {
        std::fill_n(rest, 2 * lanes, T(0));
        if (a[i] >= 0) std::copy_n(x + a[i] * depth + c, depth - c, rest);
        if (b[i] >= 0) std::copy_n(x + b[i] * depth + c, depth - c, rest + lanes);
        left = load(rest);
        right = load(rest + lanes);
      }
      points[i] = plane == 1 ? left + right : left - right;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) transform_input_axis(points + i, 4);
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) transform_input_axis(points + y * 4, 1);
    for (int i = 0; i < 16; ++i) {
      if (whole) {
        store(out + i * stride + c, points[i]);
      } else {
        store(rest, points[i]);
        std::copy_n(rest, depth - c, out + i * stride + c);
      }
    }
  }
}

// The 16 points of one plane of transformed gradients, for channels [begin, end), zeros beyond `channels`.
template <typename T>
inline void transform_gradients_plane(const Window& w, const int64_t* voxels, int plane, const T* grad, int64_t channels,
                                      int64_t begin, int64_t end, T* out, int64_t stride) {
  constexpr int64_t lanes = Vector<T>::lanes;
  using V = typename Vector<T>::type;
  // g0, g0 + g1, g0 - g1, -g1.
  static const T low[4] = {1, 1, 1, 0}, high[4] = {0, 1, -1, -1};
  alignas(64) T rest[lanes];
  for (int64_t c = begin; c < end; c += lanes) {
    V g[8], a[8], m[16];
    for (int j = 0; j < 8; ++j) {
      const bool masked = w.written_voxels != nullptr && !w.written_voxels[voxels[j]];
      if (masked || c >= channels) {
        g[j] = V{};
      } else if (c + lanes <= channels) {
        g[j] = load(grad + voxels[j] * channels + c);
      } else {
        std::fill_n(rest, lanes, T(0));
        std::copy_n(grad + voxels[j] * channels + c, channels - c, rest);
        g[j] = load(rest);
      }
    }
    for (int yx = 0; yx < 4; ++yx) g[yx] = g[yx] * low[plane] + g[4 + yx] * high[plane];  // [2, 2]
    for (int y = 0; y < 2; ++y) spread_output_axis(g[y * 2], g[y * 2 + 1], a + y * 4, 1);   // [2, 4]
    for (int x = 0; x < 4; ++x) spread_output_axis(a[x], a[4 + x], m + x, 4);               // [4, 4]
    for (int i = 0; i < 16; ++i) store(out + i * stride + (c - begin), m[i]);
  }
}

template <typename T>
void conv3d_grad_weight_winograd(const Window& window, const T* grad, const T* x, T* grad_weight, int64_t in_channels,
                                 int64_t out_channels, int threads) {
  constexpr int64_t panel = Vector<T>::panel, lanes = Vector<T>::lanes;
  using V = typename Vector<T>::type;
  const int64_t panels = (out_channels + panel - 1) / panel, padded = panels * panel;
  const Tiles tiles(window);
  // An item of work is a part of the tiles, one of four planes of points, and some panels of output channels. Parts and
  // chunks depend on the problem alone, so that results do not depend on the threads.
  constexpr int64_t kPartBytes = int64_t(16) << 20, kChunkBytes = int64_t(512) << 10;
  const int64_t bytes = static_cast<int64_t>(sizeof(T)), size = in_channels * padded;
  const int64_t most = std::clamp<int64_t>(kPartBytes / (kPoints * size * bytes), 1, 16);
  const int64_t parts = std::clamp<int64_t>(tiles.total / 512, 1, most);
  const int64_t chunk = std::clamp<int64_t>(kChunkBytes / (16 * bytes * (in_channels + padded)), 32, 128);
  const int64_t pieces = std::clamp<int64_t>((4 * threads + 4 * parts - 1) / (4 * parts), 1, panels);
  const int64_t row_groups = (in_channels + REGISTER_ROWS - 1) / REGISTER_ROWS;
  const int64_t input_stride = spread(chunk * in_channels);
  AlignedBuffer<T> sums(parts * kPoints * size);
  std::vector<int64_t> source(chunk);
  std::vector<int32_t> target(chunk);
  for (int64_t i = 0; i < chunk; ++i) source[i] = target[i] = static_cast<int32_t>(i);
  const BufferPerThread<T> all_inputs(threads, 16 * input_stride), all_gradients(threads, 16 * spread(chunk * padded));
#pragma omp parallel num_threads(threads)
  {
    T *inputs = all_inputs.mine(), *gradients = all_gradients.mine();
#pragma omp for collapse(3) schedule(dynamic)
    for (int64_t part = 0; part < parts; ++part) {
      for (int plane = 0; plane < 4; ++plane) {
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const int64_t p_begin = panels * piece / pieces, p_end = panels * (piece + 1) / pieces;
          const int64_t wide = (p_end - p_begin) * panel, grad_stride = spread(chunk * wide);
          T* total = sums.data + (part * kPoints + plane * 16) * size;
          for (int i = 0; i < 16; ++i) {
            std::fill_n(total + i * size + p_begin * in_channels * panel, wide * in_channels, T(0));
          }
          const int64_t last = tiles.total * (part + 1) / parts;
          for (int64_t first = tiles.total * part / parts; first < last; first += chunk) {
            const int64_t count = std::min(chunk, last - first);
            for (int64_t i = 0; i < count; ++i) {
              int64_t voxels[kPoints];
              tiles.inputs(first + i, voxels);
              transform_inputs_plane(voxels, plane, x, in_channels, inputs + i * in_channels, input_stride);
              tiles.outputs(first + i, voxels);
              transform_gradients_plane(window, voxels, plane, grad, out_channels, p_begin * panel, p_end * panel,
                                        gradients + i * wide, grad_stride);
            }
            for (int i = 0; i < 16; ++i) {
              for (int64_t p = p_begin; p < p_end; ++p) {
                T* sum = total + i * size + p * in_channels * panel;
                const T* g = gradients + i * grad_stride + (p - p_begin) * panel;
                for (int64_t r = 0; r < row_groups; ++r) {
                  const int64_t begin = in_channels * r / row_groups, end = in_channels * (r + 1) / row_groups;
                  correlate_rows<T, REGISTER_ROWS>(end - begin, count, inputs + i * input_stride + begin,
                                                   in_channels, source.data(), g, wide, target.data(),
                                                   sum + begin * panel);
                }
              }
            }
          }
        }
      }
    }
#pragma omp for collapse(2) schedule(static)
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t k = 0; k < in_channels; ++k) {
        for (int64_t half = 0; half < panel; half += lanes) {
          V t[kPoints], a[48], b[36], g[27];
          alignas(64) T lines[27 * lanes];
          for (int i = 0; i < kPoints; ++i) {
            const T* sum = sums.data + i * size + (p * in_channels + k) * panel + half;
            t[i] = load(sum);
            for (int64_t part = 1; part < parts; ++part) t[i] += load(sum + part * kPoints * size);
          }
          for (int yx = 0; yx < 16; ++yx) gather_weight_axis(t + yx, 16, a + yx, 16);  // [3, 4, 4]
          for (int z = 0; z < 3; ++z) {
            for (int x_ = 0; x_ < 4; ++x_) gather_weight_axis(a + z * 16 + x_, 4, b + z * 12 + x_, 4);  // [3, 3, 4]
          }
          for (int zy = 0; zy < 9; ++zy) gather_weight_axis(b + zy * 4, 1, g + zy * 3, 1);  // [3, 3, 3]
          for (int tap = 0; tap < 27; ++tap) store(lines + tap * lanes, g[tap]);
          const int64_t out = p * panel + half, filled = std::min(lanes, out_channels - out);
          for (int64_t l = 0; l < filled; ++l) {
            T* to = grad_weight + ((out + l) * in_channels + k) * 27;
            for (int tap = 0; tap < 27; ++tap) to[tap] = lines[tap * lanes + l];
          }
        }
      }
    }
  }
}
