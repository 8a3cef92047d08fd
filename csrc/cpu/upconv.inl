// Fused up-convolution: a transposed convolution of kernel and stride 2, then a 3x3x3 convolution, are eight 2x2x2
// convolutions of the coarse volume, one for each parity ("phase") of a fine voxel:
//
//   y[2q + p] = bias + sum over t in {0, 1}^3 of weight[p][:, :, t] x[q + t - 1 + p],  x zero outside the volume.
//
// Each is computed by Winograd's F(3x3x3, 2x2x2): a tile of 3x3x3 outputs from 4x4x4 inputs with 64 multiplications per
// pair of channels instead of 216. Its inputs are transformed as those of F(2x2x2, 3x3x3). The gradient of the input is
// the same with flipped taps, the sum of the phases taken before outputs are transformed. Included once per instruction
// set, inside its namespace, after winograd.inl.

constexpr int kPhases = 8;
constexpr int64_t kUpconvTile = 3;
constexpr int kUpconvOutputs = 27;

// Along one axis, four products to three outputs: [m0 + m1 + m2, m1 - m2, m1 + m2 - m3].
template <typename V>
inline void transform_upconv_output_axis(const V* m, int step, V* y, int y_step) {
  const V sum = m[step] + m[2 * step];
  y[0] = m[0] + sum;
  y[y_step] = m[step] - m[2 * step];
  y[2 * y_step] = sum - m[3 * step];
}

// Its transpose, three gradients to four: [g0, g0 + g1 + g2, g0 - g1 + g2, -g2].
template <typename V>
inline void spread_upconv_output_axis(const V* g, int step, V* m, int m_step) {
  const V sum = g[0] + g[2 * step];
  m[0] = g[0];
  m[m_step] = sum + g[step];
  m[2 * m_step] = sum - g[step];
  m[3 * m_step] = -g[2 * step];
}

// Two weights to four: [g0, (g0 + g1) / 2, (g0 - g1) / 2, g1].
template <typename V>
inline void transform_upconv_weight_axis(const V* g, int step, V* t, int t_step) {
  t[0] = g[0];
  t[t_step] = (g[0] + g[step]) * 0.5f;
  t[2 * t_step] = (g[0] - g[step]) * 0.5f;
  t[3 * t_step] = g[step];
}

// Its transpose, four to two.
template <typename V>
inline void gather_upconv_weight_axis(const V* t, int t_step, V* g, int step) {
  g[0] = t[0] + (t[t_step] + t[2 * t_step]) * 0.5f;
  g[step] = t[3 * t_step] + (t[t_step] - t[2 * t_step]) * 0.5f;
}

// `vectors` weights of each of 8 taps to those of 64 points; flipped for the gradient of the input.
template <typename T>
inline void transform_upconv_weights(const T* taps, int64_t tap_stride, bool flipped, int64_t vectors, T* points,
                                     int64_t point_stride) {
  constexpr int64_t lanes = Vector<T>::lanes;
  using V = typename Vector<T>::type;
  for (int64_t i = 0; i < vectors; ++i) {
    V g[8], a[16], b[32], t[64];
    for (int tap = 0; tap < 8; ++tap) g[tap] = load(taps + (flipped ? 7 - tap : tap) * tap_stride + i * lanes);
    for (int zy = 0; zy < 4; ++zy) transform_upconv_weight_axis(g + zy * 2, 1, a + zy * 4, 1);  // [2, 2, 4]
    for (int z = 0; z < 2; ++z) {
      for (int x = 0; x < 4; ++x) transform_upconv_weight_axis(a + z * 8 + x, 4, b + z * 16 + x, 4);  // [2, 4, 4]
    }
    for (int yx = 0; yx < 16; ++yx) transform_upconv_weight_axis(b + yx, 16, t + yx, 16);  // [4, 4, 4]
    for (int point = 0; point < kPoints; ++point) store(points + point * point_stride + i * lanes, t[point]);
  }
}

// Tiles of 3x3x3 coarse voxels, in order; the last ones of an axis may hang over the border.
struct UpconvTiles {
  explicit UpconvTiles(const Upconv& u) : batch(u.batch), coarse(u.shape) {
    fine = {2 * coarse.d, 2 * coarse.h, 2 * coarse.w};
    const auto cut = [](int64_t side) { return (side + kUpconvTile - 1) / kUpconvTile; };
    counts = {cut(coarse.d), cut(coarse.h), cut(coarse.w)};
    total = batch * counts.volume();
  }

  // The voxels begin + step * i, i in [0, SIDE), of each axis, -1 outside the volume.
  template <int SIDE>
  static void list(int64_t sample, const int64_t* begin, int64_t step, const Triple& volume, int64_t* voxels) {
    for (int i = 0; i < SIDE * SIDE * SIDE; ++i) {
      const int64_t z = begin[0] + step * (i / SIDE / SIDE), y = begin[1] + step * (i / SIDE % SIDE);
      const int64_t x = begin[2] + step * (i % SIDE);
      const bool inside = z >= 0 && z < volume.d && y >= 0 && y < volume.h && x >= 0 && x < volume.w;
      voxels[i] = inside ? ((sample * volume.d + z) * volume.h + y) * volume.w + x : -1;
    }
  }

  // Of a tile: its sample and first coarse voxel, times `scale`, plus what `shift` says for the parity of each axis.
  template <typename Shift>
  int64_t place(int64_t tile, int phase, int64_t scale, const Shift& shift, int64_t* begin) const {
    for (int axis = 2; axis >= 0; --axis) {
      begin[axis] = tile % counts[axis] * kUpconvTile * scale + shift(phase >> (2 - axis) & 1);
      tile /= counts[axis];
    }
    return tile;
  }

  // The 4x4x4 coarse voxels that a phase of a tile reads, and the 3x3x3 fine ones that it writes.
  void inputs(int64_t tile, int phase, int64_t* voxels) const {
    int64_t begin[3];
    const int64_t sample = place(tile, phase, 1, [](int p) { return p - 1; }, begin);
    list<4>(sample, begin, 1, coarse, voxels);
  }
  void outputs(int64_t tile, int phase, int64_t* voxels) const {
    int64_t begin[3];
    const int64_t sample = place(tile, phase, 2, [](int p) { return p; }, begin);
    list<3>(sample, begin, 2, fine, voxels);
  }

  // The same for the gradient of the input: the 4x4x4 fine voxels of a phase, and the 3x3x3 coarse ones.
  void gradients(int64_t tile, int phase, int64_t* voxels) const {
    int64_t begin[3];
    const int64_t sample = place(tile, phase, 2, [](int p) { return -p; }, begin);
    list<4>(sample, begin, 2, fine, voxels);
  }
  void input_gradients(int64_t tile, int64_t* voxels) const {
    int64_t begin[3];
    const int64_t sample = place(tile, 0, 1, [](int) { return 0; }, begin);
    list<3>(sample, begin, 1, coarse, voxels);
  }

  int64_t batch;
  Triple coarse, fine, counts;
  int64_t total;
};

// Products of one tile, [point * stride + c - begin], to its outputs, for channels [begin, end) of `wide`.
template <typename T>
inline void transform_upconv_outputs(const int64_t* voxels, const T* products, int64_t stride, const T* bias, T* written,
                                     int64_t wide, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Vector<T>::lanes;
  using V = typename Vector<T>::type;
  for (int64_t c = begin; c < end; c += lanes) {
    const int64_t filled = std::min(lanes, end - c);
    alignas(64) T line[lanes] = {};
    if (bias != nullptr) std::copy_n(bias + c, filled, line);
    const V start = load(line);
    V a[48];
    for (int yx = 0; yx < 16; ++yx) {
      V m[4];
#pragma GCC unroll 4
      for (int z = 0; z < 4; ++z) m[z] = load(products + (z * 16 + yx) * stride + c - begin);
      transform_upconv_output_axis(m, 1, a + yx, 16);  // [3, 4, 4]
    }
    for (int z = 0; z < 3; ++z) {
      V b[12], y[9];
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) transform_upconv_output_axis(a + z * 16 + x, 4, b + x, 4);  // [3, 4]
#pragma GCC unroll 3
      for (int row = 0; row < 3; ++row) transform_upconv_output_axis(b + row * 4, 1, y + row * 3, 1);  // [3, 3]
      for (int j = 0; j < 9; ++j) {
        const int64_t voxel = voxels[z * 9 + j];
        if (voxel < 0) continue;
        if (filled == lanes) {
          store(written + voxel * wide + c, y[j] + start);
        } else {
          store(line, y[j] + start);
          std::copy_n(line, filled, written + voxel * wide + c);
        }
      }
    }
  }
}

// The weight of one phase.
template <typename T>
inline const T* weight_of_phase(const Upconv& u, const T* weight, int phase) {
  return weight + phase * u.out_channels * u.in_channels * 8;
}

template <typename T>
void upconv3d_by_chunk(const Upconv& u, bool transposed, const T* gathered, const T* weight, const T* bias, T* written,
                       int threads) {
  constexpr int64_t panel = Vector<T>::panel, lanes = Vector<T>::lanes;
  const UpconvTiles tiles(u);
  const int64_t depth = transposed ? u.out_channels : u.in_channels, wide = transposed ? u.in_channels : u.out_channels;
  const int64_t panels = (wide + panel - 1) / panel, padded = panels * panel, size = panels * depth * panel;
  AlignedBuffer<T> packed(8 * size), points(kPhases * kPoints * size);  // [8 or phase and 64, panel, k, NR]
  for (int phase = 0; phase < kPhases; ++phase) {
    pack_weights(weight_of_phase(u, weight, phase), transposed, 8, u.in_channels, u.out_channels, packed.data, threads);
    T* to = points.data + phase * kPoints * size;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t line = 0; line < panels * depth; ++line) {
      transform_upconv_weights(packed.data + line * panel, size, transposed, panel / lanes, to + line * panel, size);
    }
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
      for (int phase = 0; phase < kPhases; ++phase) {
        for (int64_t i = 0; i < count; ++i) {
          transposed ? tiles.gradients(first + i, phase, voxels) : tiles.inputs(first + i, phase, voxels);
          transform_inputs(voxels, gathered, depth, depth, inputs + i * depth, input_stride);
        }
        for (int point = 0; point < kPoints; ++point) {
          const T* x = inputs + point * input_stride;
          T* y = products + point * product_stride;
          for (int64_t p = 0; p < panels; ++p) {
            const T* weights = points.data + (phase * kPoints + point) * size + p * depth * panel;
            if (transposed && phase > 0) {
              product<T, true>(count, x, depth, depth, weights, y + p * panel, padded);
            } else {
              product<T, false>(count, x, depth, depth, weights, y + p * panel, padded);
            }
          }
        }
        if (transposed && phase < kPhases - 1) continue;
        for (int64_t i = 0; i < count; ++i) {
          transposed ? tiles.input_gradients(first + i, voxels) : tiles.outputs(first + i, phase, voxels);
          transform_upconv_outputs(voxels, products + i * padded, product_stride, bias, written, wide, 0, wide);
        }
      }
    }
  }
}

template <typename T>
void upconv3d(const Upconv& u, const T* x, const T* weight, const T* bias, T* y, int threads) {
  upconv3d_by_chunk(u, false, x, weight, bias, y, threads);
}

template <typename T>
void upconv3d_grad_input(const Upconv& u, const T* grad, const T* weight, T* grad_x, int threads) {
  upconv3d_by_chunk<T>(u, true, grad, weight, nullptr, grad_x, threads);
}

// The 16 points of one plane of transformed gradients, for channels [begin, end), zeros beyond `channels`.
template <typename T>
inline void transform_upconv_gradients_plane(const int64_t* voxels, int plane, const T* grad, int64_t channels,
                                             int64_t begin, int64_t end, T* out, int64_t stride) {
  constexpr int64_t lanes = Vector<T>::lanes;
  using V = typename Vector<T>::type;
  // g0, g0 + g1 + g2, g0 - g1 + g2, -g2.
  static const T factors[4][3] = {{1, 0, 0}, {1, 1, 1}, {1, -1, 1}, {0, 0, -1}};
  alignas(64) T rest[lanes];
  for (int64_t c = begin; c < end; c += lanes) {
    V g[9], a[12], m[16];
    for (int yx = 0; yx < 9; ++yx) {
      g[yx] = V{};
      for (int z = 0; z < 3; ++z) {
        const int64_t voxel = voxels[z * 9 + yx];
        if (factors[plane][z] == 0 || voxel < 0 || c >= channels) continue;
        if (c + lanes <= channels) {
          g[yx] += load(grad + voxel * channels + c) * factors[plane][z];
        } else {
          std::fill_n(rest, lanes, T(0));
          std::copy_n(grad + voxel * channels + c, channels - c, rest);
          g[yx] += load(rest) * factors[plane][z];
        }
      }
    }
    for (int y = 0; y < 3; ++y) spread_upconv_output_axis(g + y * 3, 1, a + y * 4, 1);  // [3, 4]
    for (int x = 0; x < 4; ++x) spread_upconv_output_axis(a + x, 4, m + x, 4);          // [4, 4]
    for (int i = 0; i < 16; ++i) store(out + i * stride + (c - begin), m[i]);
  }
}

// The 64 points of a phase's gradient for one vector of output channels, from `out` on, and input channel k, to its taps.
template <typename T>
inline void transform_upconv_weight_gradient(const typename Vector<T>::type* points, T* grad_weight, int64_t in_channels,
                                             int64_t out_channels, int64_t out, int64_t k) {
  constexpr int64_t lanes = Vector<T>::lanes;
  typename Vector<T>::type a[32], b[16], g[8];
  alignas(64) T lines[8 * lanes];
  for (int yx = 0; yx < 16; ++yx) gather_upconv_weight_axis(points + yx, 16, a + yx, 16);  // [2, 4, 4]
  for (int z = 0; z < 2; ++z) {
    for (int x = 0; x < 4; ++x) gather_upconv_weight_axis(a + z * 16 + x, 4, b + z * 8 + x, 4);  // [2, 2, 4]
  }
  for (int zy = 0; zy < 4; ++zy) gather_upconv_weight_axis(b + zy * 4, 1, g + zy * 2, 1);  // [2, 2, 2]
  for (int tap = 0; tap < 8; ++tap) store(lines + tap * lanes, g[tap]);
  T* to = grad_weight + (out * in_channels + k) * 8;
  for (int64_t l = 0; l < std::min(lanes, out_channels - out); ++l) {
    for (int tap = 0; tap < 8; ++tap) to[l * in_channels * 8 + tap] = lines[tap * lanes + l];
  }
}

template <typename T>
void upconv3d_grad_weight(const Upconv& u, const T* grad, const T* x, T* grad_weight, int threads) {
  constexpr int64_t panel = Vector<T>::panel, lanes = Vector<T>::lanes;
  using V = typename Vector<T>::type;
  const UpconvTiles tiles(u);
  const int64_t in_channels = u.in_channels, out_channels = u.out_channels;
  const int64_t panels = (out_channels + panel - 1) / panel, padded = panels * panel, size = in_channels * padded;
  // Tiles are taken in parts whose features stay in the cache while all items of work, a phase, one of its four planes of
  // points and some panels of output channels, pass over them. Parts and chunks depend on the problem alone, so that
  // results do not depend on the threads.
  constexpr int64_t kPartBytes = int64_t(8) << 20, kChunkBytes = int64_t(512) << 10;
  const int64_t bytes = static_cast<int64_t>(sizeof(T));
  const int64_t chunk = std::clamp<int64_t>(kChunkBytes / (16 * bytes * (in_channels + padded)), 32, 128);
  const int64_t of_tile = kUpconvOutputs * bytes * (in_channels + kPhases * out_channels);
  const int64_t part = std::max<int64_t>(kPartBytes / of_tile / chunk, 1) * chunk;
  const int64_t pieces = std::clamp<int64_t>((4 * threads + 31) / 32, 1, panels);
  const int64_t row_groups = (in_channels + REGISTER_ROWS - 1) / REGISTER_ROWS;
  const int64_t input_stride = spread(chunk * in_channels);
  AlignedBuffer<T> sums(kPhases * kPoints * size);
  std::vector<int64_t> source(chunk);
  std::vector<int32_t> target(chunk);
  for (int64_t i = 0; i < chunk; ++i) source[i] = target[i] = static_cast<int32_t>(i);
  const BufferPerThread<T> all_inputs(threads, 16 * input_stride), all_gradients(threads, 16 * spread(chunk * padded));
#pragma omp parallel num_threads(threads)
  {
    T *inputs = all_inputs.mine(), *gradients = all_gradients.mine();
    int64_t voxels[kPoints];
#pragma omp for schedule(static)
    for (int64_t i = 0; i < kPhases * kPoints; ++i) std::fill_n(sums.data + i * size, size, T(0));
    for (int64_t begin = 0; begin < tiles.total; begin += part) {
      const int64_t last = std::min(tiles.total, begin + part);
#pragma omp for collapse(2) schedule(dynamic)
      for (int item = 0; item < kPhases * 4; ++item) {
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const int phase = item / 4, plane = item % 4;
          const int64_t p_begin = panels * piece / pieces, p_end = panels * (piece + 1) / pieces;
          const int64_t wide = (p_end - p_begin) * panel, grad_stride = spread(chunk * wide);
          T* total = sums.data + item * 16 * size;
          for (int64_t first = begin; first < last; first += chunk) {
            const int64_t count = std::min(chunk, last - first);
            for (int64_t i = 0; i < count; ++i) {
              tiles.inputs(first + i, phase, voxels);
              transform_inputs_plane(voxels, plane, x, in_channels, inputs + i * in_channels, input_stride);
              tiles.outputs(first + i, phase, voxels);
              transform_upconv_gradients_plane(voxels, plane, grad, out_channels, p_begin * panel, p_end * panel,
                                               gradients + i * wide, grad_stride);
            }
            for (int i = 0; i < 16; ++i) {
              for (int64_t p = p_begin; p < p_end; ++p) {
                T* sum = total + i * size + p * in_channels * panel;
                const T* g = gradients + i * grad_stride + (p - p_begin) * panel;
                for (int64_t r = 0; r < row_groups; ++r) {
                  const int64_t row = in_channels * r / row_groups, end = in_channels * (r + 1) / row_groups;
                  correlate_rows<T, REGISTER_ROWS>(end - row, count, inputs + i * input_stride + row, in_channels,
                                                   source.data(), g, wide, target.data(), sum + row * panel);
                }
              }
            }
          }
        }
      }
    }
#pragma omp for collapse(2) schedule(static)
    for (int phase = 0; phase < kPhases; ++phase) {
      for (int64_t line = 0; line < panels * in_channels; ++line) {
        T* to = grad_weight + phase * out_channels * in_channels * 8;
        for (int64_t half = 0; half < panel; half += lanes) {
          V t[kPoints];
          for (int i = 0; i < kPoints; ++i) t[i] = load(sums.data + (phase * kPoints + i) * size + line * panel + half);
          transform_upconv_weight_gradient(t, to, in_channels, out_channels, line / in_channels * panel + half,
                                           line % in_channels);
        }
      }
    }
  }
}
