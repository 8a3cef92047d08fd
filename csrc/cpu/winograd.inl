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

// `vectors` weights of each of 27 taps to those of 64 points. The transposed convolution correlates with flipped taps.
template <typename T>
inline void transform_weights(const T* taps, int64_t tap_stride, bool flipped, int64_t vectors, T* points,
                              int64_t point_stride) {
  constexpr int64_t lanes = Vector<T>::lanes;
  using V = typename Vector<T>::type;
  for (int64_t i = 0; i < vectors; ++i) {
    V g[27], a[36], b[48], t[64];
    for (int tap = 0; tap < 27; ++tap) g[tap] = load(taps + (flipped ? 26 - tap : tap) * tap_stride + i * lanes);
    for (int zy = 0; zy < 9; ++zy) transform_weight_axis(g + zy * 3, 1, a + zy * 4, 1);           // [3, 3, 4]
    for (int z = 0; z < 3; ++z) {
      for (int x = 0; x < 4; ++x) transform_weight_axis(a + z * 12 + x, 4, b + z * 16 + x, 4);    // [3, 4, 4]
    }
    for (int yx = 0; yx < 16; ++yx) transform_weight_axis(b + yx, 16, t + yx, 16);                // [4, 4, 4]
    for (int point = 0; point < kPoints; ++point) store(points + point * point_stride + i * lanes, t[point]);
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

// Products of one tile, [point * stride + c - begin], to its outputs, for channels [begin, end) of `wide`.
template <typename T>
inline void transform_outputs(const Window& window, const int64_t* voxels, const T* products, int64_t stride,
                              const T* bias, T* written, int64_t wide, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Vector<T>::lanes;
  using V = typename Vector<T>::type;
  for (int64_t c = begin; c < end; c += lanes) {
    V a[32], y[8];
    for (int yx = 0; yx < 16; ++yx) {
      V m[4];
#pragma GCC unroll 4
      for (int z = 0; z < 4; ++z) m[z] = load(products + (z * 16 + yx) * stride + c - begin);
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
    const int64_t filled = std::min(lanes, end - c);
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

// Where tiles are few, transformed weights would be written to memory and read back for a handful of products. So a panel
// is packed and transformed slice by slice of the gathered channels, each slice used at once, in the cache, for all tiles.
// Tiles are taken so many at a time, that their products stay in the L2 cache.
constexpr int64_t kTilesOfPanel = 64;

template <typename T>
void conv3d_winograd_by_panel(const Tiles& tiles, const T* gathered, const T* weight, const T* bias, T* written,
                              int64_t in_channels, int64_t out_channels, int threads) {
  constexpr int64_t panel = Vector<T>::panel, lanes = Vector<T>::lanes;
  if (tiles.total == 0) return;
  const Window& window = tiles.w;
  const int64_t depth = window.transposed ? out_channels : in_channels;
  const int64_t wide = window.transposed ? in_channels : out_channels;
  const int64_t panels = (wide + panel - 1) / panel;
  const int64_t groups = (tiles.total + kTilesOfPanel - 1) / kTilesOfPanel, largest = (tiles.total + groups - 1) / groups;
  // More threads than panels share the tiles; a result does not depend on how they are cut.
  const int64_t cuts = std::clamp<int64_t>((2 * threads + panels - 1) / panels, 1, largest);
  const int64_t input_stride = spread(largest * depth), product_stride = spread((largest + cuts - 1) / cuts * panel);
  const int64_t bytes = static_cast<int64_t>(kPoints * panel * sizeof(T));
  const int64_t slice = std::clamp<int64_t>(kSliceBytes / bytes, 1, depth), stride = (slice + 1) * panel;
  AlignedBuffer<T> inputs(kPoints * input_stride);
  const BufferPerThread<T> all_packed(threads, 27 * stride), all_points(threads, kPoints * stride);
  const BufferPerThread<T> all_products(threads, kPoints * product_stride);
#pragma omp parallel num_threads(threads)
  for (int64_t group = 0; group < groups; ++group) {
    T *packed = all_packed.mine(), *points = all_points.mine(), *products = all_products.mine();
    int64_t voxels[kPoints];
    const int64_t begin = tiles.total * group / groups, total = tiles.total * (group + 1) / groups - begin;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < total; ++i) {
      tiles.inputs(begin + i, voxels);
      transform_inputs(voxels, gathered, depth, depth, inputs.data + i * depth, input_stride);
    }
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t cut = 0; cut < cuts; ++cut) {
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t first = total * cut / cuts, count = total * (cut + 1) / cuts - first;
        std::fill_n(products, kPoints * product_stride, T(0));
        for (int64_t k = 0; k < depth; k += slice) {
          const int64_t end = std::min(depth, k + slice);
          pack_panel(weight, window.transposed, 27, in_channels, out_channels, p, k, end, packed, stride);
          transform_weights(packed, stride, window.transposed, (end - k) * panel / lanes, points, stride);
          for (int point = 0; point < kPoints; ++point) {
            const T* x = inputs.data + point * input_stride + first * depth + k;
            product<T, true>(count, x, depth, end - k, points + point * stride, products + point * product_stride, panel);
          }
        }
        for (int64_t i = 0; i < count; ++i) {
          tiles.outputs(begin + first + i, voxels);
          transform_outputs(window, voxels, products + i * panel, product_stride, bias, written, wide, p * panel,
                            std::min(wide, (p + 1) * panel));
        }
      }
    }
  }
}

template <typename T>
void conv3d_winograd(const Window& window, const T* gathered, const T* weight, const T* bias, T* written,
                     int64_t in_channels, int64_t out_channels, int threads) {
  constexpr int64_t panel = Vector<T>::panel, lanes = Vector<T>::lanes;
  const Tiles tiles(window);
  if (tiles.total <= 4 * kTilesOfPanel) {
    return conv3d_winograd_by_panel(tiles, gathered, weight, bias, written, in_channels, out_channels, threads);
  }
  const int64_t depth = window.transposed ? out_channels : in_channels;
  const int64_t wide = window.transposed ? in_channels : out_channels;
  const int64_t panels = (wide + panel - 1) / panel, padded = panels * panel, size = panels * depth * panel;
  AlignedBuffer<T> packed(27 * size), points(kPoints * size);  // [27 or 64, panel, k, NR]
  pack_weights(weight, window.transposed, 27, in_channels, out_channels, packed.data, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t line = 0; line < panels * depth; ++line) {
    transform_weights(packed.data + line * panel, size, window.transposed, panel / lanes, points.data + line * panel, size);
  }
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
          product<T, false>(count, x, depth, depth, weights, y + p * panel, padded);
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        tiles.outputs(first + i, voxels);
        transform_outputs(window, voxels, products + i * padded, product_stride, bias, written, wide, 0, wide);
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

// The 64 points of the gradient for one vector of output channels, from `out` on, and input channel k, to its 27 taps.
template <typename T>
inline void transform_weight_gradient(const typename Vector<T>::type* points, T* grad_weight, int64_t in_channels,
                                      int64_t out_channels, int64_t out, int64_t k) {
  constexpr int64_t lanes = Vector<T>::lanes;
  typename Vector<T>::type a[48], b[36], g[27];
  alignas(64) T lines[27 * lanes];
  for (int yx = 0; yx < 16; ++yx) gather_weight_axis(points + yx, 16, a + yx, 16);  // [3, 4, 4]
  for (int z = 0; z < 3; ++z) {
    for (int x = 0; x < 4; ++x) gather_weight_axis(a + z * 16 + x, 4, b + z * 12 + x, 4);  // [3, 3, 4]
  }
  for (int zy = 0; zy < 9; ++zy) gather_weight_axis(b + zy * 4, 1, g + zy * 3, 1);  // [3, 3, 3]
  for (int tap = 0; tap < 27; ++tap) store(lines + tap * lanes, g[tap]);
  T* to = grad_weight + (out * in_channels + k) * 27;
  if (kTransposes && out + lanes <= out_channels) {
    for (int64_t tap = 0; tap < 27; tap += lanes) {
      const int64_t first = std::min(tap, 27 - lanes);  // the last ones overlap those before
      transpose(lines + first * lanes, lanes, to + first, in_channels * 27);
    }
    return;
  }
  for (int64_t l = 0; l < std::min(lanes, out_channels - out); ++l) {
    for (int tap = 0; tap < 27; ++tap) to[l * in_channels * 27 + tap] = lines[tap * lanes + l];
  }
}

// As the convolution by panel: the points of a few weights at a time are added up and transformed in the cache.
template <typename T>
void conv3d_grad_weight_winograd_by_panel(const Tiles& tiles, const T* grad, const T* x, T* grad_weight,
                                          int64_t in_channels, int64_t out_channels, int threads) {
  constexpr int64_t panel = Vector<T>::panel, lanes = Vector<T>::lanes, rows = 4 * REGISTER_ROWS;
  const int64_t panels = (out_channels + panel - 1) / panel, row_groups = (in_channels + rows - 1) / rows;
  const int64_t input_stride = spread(tiles.total * rows), gradient_stride = spread(tiles.total * panel);
  // [rows or panel, point, tile, channel]: what is multiplied lies together.
  AlignedBuffer<T> inputs(row_groups * kPoints * input_stride), gradients(panels * kPoints * gradient_stride);
  const BufferPerThread<T> all_sums(threads, kPoints * rows * panel);
  std::vector<int64_t> source(tiles.total);
  std::vector<int32_t> target(tiles.total);
  for (int64_t i = 0; i < tiles.total; ++i) source[i] = target[i] = static_cast<int32_t>(i);
#pragma omp parallel num_threads(threads)
  {
    T* sums = all_sums.mine();
    int64_t voxels[kPoints];
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles.total; ++i) {
      tiles.inputs(i, voxels);
      for (int64_t r = 0; r < row_groups; ++r) {
        transform_inputs(voxels, x + r * rows, in_channels, std::min(rows, in_channels - r * rows),
                         inputs.data + r * kPoints * input_stride + i * rows, input_stride);
      }
      tiles.outputs(i, voxels);
      for (int64_t p = 0; p < panels; ++p) {
        for (int plane = 0; plane < 4; ++plane) {
          T* to = gradients.data + (p * kPoints + plane * 16) * gradient_stride + i * panel;
          transform_gradients_plane(tiles.w, voxels, plane, grad, out_channels, p * panel, (p + 1) * panel, to,
                                    gradient_stride);
        }
      }
    }
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t r = 0; r < row_groups; ++r) {
        const int64_t count = std::min(rows, in_channels - r * rows);
        std::fill_n(sums, kPoints * rows * panel, T(0));
        for (int point = 0; point < kPoints; ++point) {
          const T* from = inputs.data + (r * kPoints + point) * input_stride;
          const T* g = gradients.data + (p * kPoints + point) * gradient_stride;
          for (int64_t m = 0; m < count; m += REGISTER_ROWS) {
            correlate_rows<T, REGISTER_ROWS>(std::min<int64_t>(REGISTER_ROWS, count - m), tiles.total, from + m, rows,
                                             source.data(), g, panel, target.data(), sums + (point * rows + m) * panel);
          }
        }
        for (int64_t m = 0; m < count; ++m) {
          for (int64_t half = 0; half < panel; half += lanes) {
            typename Vector<T>::type t[kPoints];
            for (int i = 0; i < kPoints; ++i) t[i] = load(sums + (i * rows + m) * panel + half);
            transform_weight_gradient(t, grad_weight, in_channels, out_channels, p * panel + half, r * rows + m);
          }
        }
      }
    }
  }
}

template <typename T>
void conv3d_grad_weight_winograd(const Window& window, const T* grad, const T* x, T* grad_weight, int64_t in_channels,
                                 int64_t out_channels, int threads) {
  constexpr int64_t panel = Vector<T>::panel, lanes = Vector<T>::lanes;
  using V = typename Vector<T>::type;
  const Tiles tiles(window);
  if (tiles.total <= 2 * kTilesOfPanel) {
    return conv3d_grad_weight_winograd_by_panel(tiles, grad, x, grad_weight, in_channels, out_channels, threads);
  }
  const int64_t panels = (out_channels + panel - 1) / panel, padded = panels * panel;
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
          V t[kPoints];
          for (int i = 0; i < kPoints; ++i) {
            const T* sum = sums.data + i * size + (p * in_channels + k) * panel + half;
            t[i] = load(sum);
            for (int64_t part = 1; part < parts; ++part) t[i] += load(sum + part * kPoints * size);
          }
          transform_weight_gradient(t, grad_weight, in_channels, out_channels, p * panel + half, k);
        }
      }
    }
  }
}
