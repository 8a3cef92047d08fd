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

// Tiles of 3x3x3 coarse voxels, in order; the last ones of an axis may hang over the border. Forward, coarse voxels are
// gathered and fine ones written; transposed (gradient of the input) the reverse.
struct UpconvTiles {
  UpconvTiles(const Upconv& u, bool transposed) : transposed(transposed), coarse(u.shape) {
    fine = {2 * coarse.d, 2 * coarse.h, 2 * coarse.w};
    const auto cut = [](int64_t side) { return (side + kUpconvTile - 1) / kUpconvTile; };
    counts = {cut(coarse.d), cut(coarse.h), cut(coarse.w)};
    total = u.batch * counts.volume();
  }

  // The 4x4x4 voxels that a phase of a tile gathers, and the 3x3x3 that it writes; -1 outside the volume.
  void gathered(int64_t tile, int phase, int64_t* voxels) const {
    if (transposed) return list<4>(tile, phase, 2, {0, -1}, fine, voxels);
    list<4>(tile, phase, 1, {-1, 0}, coarse, voxels);
  }
  void written(int64_t tile, int phase, int64_t* voxels) const {
    if (transposed) return list<3>(tile, phase, 1, {0, 0}, coarse, voxels);
    list<3>(tile, phase, 2, {0, 1}, fine, voxels);
  }

  // Along each axis SIDE voxels, `step` apart, the first moved by what `shifts` says for the phase's parity.
  template <int SIDE>
  void list(int64_t tile, int phase, int64_t step, const std::array<int64_t, 2>& shifts, const Triple& volume,
            int64_t* voxels) const {
    constexpr int64_t kOutside = -(int64_t(1) << 60);  // makes any sum negative
    int64_t offsets[3][SIDE], stride = 1;
    for (int axis = 2; axis >= 0; --axis) {
      const int64_t first = tile % counts[axis] * kUpconvTile * step + shifts[phase >> (2 - axis) & 1];
      for (int i = 0; i < SIDE; ++i) {
        const int64_t at = first + step * i;
        offsets[axis][i] = at >= 0 && at < volume[axis] ? at * stride : kOutside;
      }
      stride *= volume[axis];
      tile /= counts[axis];
    }
    for (int i = 0; i < SIDE * SIDE * SIDE; ++i) {
      const int64_t at = offsets[0][i / SIDE / SIDE] + offsets[1][i / SIDE % SIDE] + offsets[2][i % SIDE];
      voxels[i] = at < 0 ? -1 : tile * stride + at;  // what is left of the tile's number is its sample
    }
  }

  bool transposed;
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

// Lines of a tile's voxels are too far apart for the processor to see what comes next: asks for `channels` of each.
template <typename T, int COUNT>
inline void prefetch(const int64_t* voxels, const T* x, int64_t stride, int64_t channels) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int i = 0; i < COUNT; ++i) {
    for (int64_t c = 0; c < channels && voxels[i] >= 0; c += line) __builtin_prefetch(x + voxels[i] * stride + c);
  }
}

// The weight of one phase.
template <typename T>
inline const T* weight_of_phase(const Upconv& u, const T* weight, int phase) {
  return weight + phase * u.out_channels * u.in_channels * 8;
}

// Transformed weights are eight times the weight, so they are never written to memory: as by conv3d_winograd_by_panel, a
// panel is packed and transformed slice by slice of the gathered channels, each slice used at once for a group of tiles.
template <typename T>
void convolve_phases(const Upconv& u, bool transposed, const T* gathered, const T* weight, const T* bias, T* written,
                       int threads) {
  constexpr int64_t panel = Vector<T>::panel, lanes = Vector<T>::lanes;
  const UpconvTiles tiles(u, transposed);
  if (tiles.total == 0) return;
  const int64_t depth = transposed ? u.out_channels : u.in_channels, wide = transposed ? u.in_channels : u.out_channels;
  const int64_t panels = (wide + panel - 1) / panel;
  // Panels and cuts of a group's tiles are equal work for all threads; a result does not depend on how tiles are cut.
  const int64_t wanted = threads / std::gcd<int64_t>(threads, panels), most = kTilesOfPanel * wanted;
  const int64_t groups = (tiles.total + most - 1) / most, largest = (tiles.total + groups - 1) / groups;
  const int64_t cuts = std::min(wanted, largest);
  const int64_t bytes = static_cast<int64_t>(kPoints * panel * sizeof(T));
  const int64_t slice = std::clamp<int64_t>(kSliceBytes / bytes, 1, depth), stride = (slice + 1) * panel;
  const int64_t slices = (depth + slice - 1) / slice;
  const int64_t input_stride = spread(largest * slice), product_stride = spread((largest + cuts - 1) / cuts * panel);
  // [slice, point, tile, channel]: what is multiplied lies together.
  AlignedBuffer<T> inputs(slices * kPoints * input_stride);
  const BufferPerThread<T> all_packed(threads, 8 * stride), all_points(threads, kPoints * stride);
  // Products are needed until outputs are made of them: after each phase, or after the last.
  const int64_t products_size = kPoints * product_stride;
  AlignedBuffer<T> all_products((transposed ? cuts * panels : threads) * products_size);
#pragma omp parallel num_threads(threads)
  for (int64_t group = 0; group < groups; ++group) {
    T *packed = all_packed.mine(), *points = all_points.mine();
    int64_t voxels[kPoints], next[kPoints];
    const int64_t begin = tiles.total * group / groups, total = tiles.total * (group + 1) / groups - begin;
    for (int phase = 0; phase < kPhases; ++phase) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < total; ++i) {
        const int64_t tile = begin + i, after = begin + std::min(i + 1, total - 1);
        tiles.gathered(tile, phase, voxels);
        tiles.gathered(after, phase, next);
        for (int64_t s = 0; s < slices; ++s) {
          const T* from = gathered + s * slice;
          const int64_t count = std::min(slice, depth - s * slice);
          prefetch<T, kPoints>(next, from, depth, count);
          transform_inputs(voxels, from, depth, count, inputs.data + s * kPoints * input_stride + i * slice, input_stride);
        }
      }
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t cut = 0; cut < cuts; ++cut) {
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t first = total * cut / cuts, count = total * (cut + 1) / cuts - first;
          T* products = all_products.data + (transposed ? cut * panels + p : thread_number()) * products_size;
          if (!transposed || phase == 0) std::fill_n(products, products_size, T(0));
          for (int64_t s = 0; s < slices; ++s) {
            const int64_t k = s * slice, end = std::min(depth, k + slice);
            pack_panel(weight_of_phase(u, weight, phase), transposed, 8, u.in_channels, u.out_channels, p, k, end, packed,
                       stride);
            transform_upconv_weights(packed, stride, transposed, (end - k) * panel / lanes, points, stride);
            for (int point = 0; point < kPoints; ++point) {
              const T* x = inputs.data + (s * kPoints + point) * input_stride + first * slice;
              product<T, true>(count, x, slice, end - k, points + point * stride, products + point * product_stride, panel);
            }
          }
          if (transposed && phase < kPhases - 1) continue;
          for (int64_t i = 0; i < count; ++i) {
            tiles.written(begin + first + i, phase, voxels);
            transform_upconv_outputs(voxels, products + i * panel, product_stride, bias, written, wide, p * panel,
                                     std::min(wide, (p + 1) * panel));
          }
        }
      }
    }
  }
}

template <typename T>
void upconv3d(const Upconv& u, const T* x, const T* weight, const T* bias, T* y, int threads) {
  convolve_phases(u, false, x, weight, bias, y, threads);
}

template <typename T>
void upconv3d_grad_input(const Upconv& u, const T* grad, const T* weight, T* grad_x, int threads) {
  convolve_phases<T>(u, true, grad, weight, nullptr, grad_x, threads);
}

// The 64 points of the gradients of one tile, out[point * stride + c - begin], for channels [begin, end) of which those from
// `channels` on are zeros.
template <typename T>
inline void transform_upconv_gradients(const int64_t* voxels, const T* grad, int64_t channels, int64_t begin, int64_t end,
                                       T* out, int64_t stride) {
  constexpr int64_t lanes = Vector<T>::lanes;
  using V = typename Vector<T>::type;
  alignas(64) T rest[kUpconvOutputs * lanes];
  for (int64_t c = begin; c < end; c += lanes) {
    const bool whole = c + lanes <= channels;
    if (!whole) {
      std::fill_n(rest, kUpconvOutputs * lanes, T(0));
      for (int i = 0; i < kUpconvOutputs && c < channels; ++i) {
        if (voxels[i] >= 0) std::copy_n(grad + voxels[i] * channels + c, channels - c, rest + i * lanes);
      }
    }
    V t[36];
    for (int yx = 0; yx < 9; ++yx) {
      V column[3];
#pragma GCC unroll 3
      for (int z = 0; z < 3; ++z) {
        const int i = z * 9 + yx;
        column[z] = !whole ? load(rest + i * lanes) : voxels[i] < 0 ? V{} : load(grad + voxels[i] * channels + c);
      }
      spread_upconv_output_axis(column, 1, t + yx, 9);  // [4, 3, 3]
    }
    for (int z = 0; z < 4; ++z) {
      V a[12], m[16];
#pragma GCC unroll 3
      for (int x = 0; x < 3; ++x) spread_upconv_output_axis(t + z * 9 + x, 3, a + x, 3);  // [4, 3]
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) spread_upconv_output_axis(a + y * 3, 1, m + y * 4, 1);  // [4, 4]
      T* to = out + z * 16 * stride + c - begin;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) store(to + i * stride, m[i]);
    }
  }
}

// The 64 points of a phase's gradient for one vector of output channels, from `out` on, and input channel k, to its taps.
template <typename T>
inline void transform_upconv_weight_gradient(const typename Vector<T>::type* points, T* grad_weight, int64_t in_channels,
                                             int64_t out_channels, int64_t out, int64_t k) {
  constexpr int64_t lanes = Vector<T>::lanes;
  typename Vector<T>::type a[32], b[16], g[8];
  for (int yx = 0; yx < 16; ++yx) gather_upconv_weight_axis(points + yx, 16, a + yx, 16);  // [2, 4, 4]
  for (int z = 0; z < 2; ++z) {
    for (int x = 0; x < 4; ++x) gather_upconv_weight_axis(a + z * 16 + x, 4, b + z * 8 + x, 4);  // [2, 2, 4]
  }
  for (int zy = 0; zy < 4; ++zy) gather_upconv_weight_axis(b + zy * 4, 1, g + zy * 2, 1);  // [2, 2, 2]
  T* to = grad_weight + (out * in_channels + k) * 8;
  const bool whole = kTransposes && out + lanes <= out_channels;
  if (whole && lanes == 16) return Halves<T>::to_rows(g, to, in_channels * 8);
  alignas(64) T lines[8 * lanes];
  for (int tap = 0; tap < 8; ++tap) store(lines + tap * lanes, g[tap]);
  if (whole) {
    for (int64_t tap = 0; tap < 8; tap += lanes) transpose(lines + tap * lanes, lanes, to + tap, in_channels * 8);
    return;
  }
  for (int64_t l = 0; l < std::min(lanes, out_channels - out); ++l) {
    for (int tap = 0; tap < 8; ++tap) to[l * in_channels * 8 + tap] = lines[tap * lanes + l];
  }
}

// Phase by phase, of one group of tiles after the other whose transformed features stay in the cache: the points of a few
// weights at a time are added up over its tiles.
template <typename T>
void upconv3d_grad_weight(const Upconv& u, const T* grad, const T* x, T* grad_weight, int threads) {
  constexpr int64_t panel = Vector<T>::panel, lanes = Vector<T>::lanes;
  const UpconvTiles tiles(u, false);
  if (tiles.total == 0) return void(std::fill_n(grad_weight, u.weights(), T(0)));
  const int64_t in_channels = u.in_channels, out_channels = u.out_channels;
  const int64_t panels = (out_channels + panel - 1) / panel;
  // Tiles are grouped by the problem alone, so that results do not depend on the threads.
  constexpr int64_t kGroupBytes = int64_t(1) << 20;
  const int64_t of_tile = kPoints * static_cast<int64_t>(sizeof(T)) * (in_channels + panels * panel);
  const int64_t most = std::max<int64_t>(kGroupBytes / of_tile, kTilesOfPanel);
  const int64_t groups = (tiles.total + most - 1) / most, largest = (tiles.total + groups - 1) / groups;
  // Input channels are cut into whole vectors, few enough that their sums stay in the cache, and for all threads.
  const int64_t wanted = std::max<int64_t>((in_channels + 47) / 48, (2 * threads + panels - 1) / panels);
  const int64_t rows = ((in_channels + wanted - 1) / wanted + lanes - 1) / lanes * lanes;
  const int64_t cuts = (in_channels + rows - 1) / rows, items = panels * cuts;
  const int64_t input_stride = spread(largest * rows), gradient_stride = spread(largest * panel);
  // [rows or panel, point, tile, channel]: what is multiplied lies together.
  AlignedBuffer<T> inputs(cuts * kPoints * input_stride), gradients(panels * kPoints * gradient_stride);
  // Sums [point, row, NR] of one item are made at once, or kept from group to group; then points are items of their own.
  const int64_t size = kPoints * rows * panel, pieces = groups > 1 ? kPoints : 1;
  AlignedBuffer<T> all_sums((groups > 1 ? items : threads) * size);
  std::vector<int64_t> source(largest);
  std::vector<int32_t> target(largest);
  for (int64_t i = 0; i < largest; ++i) source[i] = target[i] = static_cast<int32_t>(i);
  // Rows [begin, end) of an item's sums to taps.
  const auto finish = [&](int phase, int64_t item, int64_t begin, int64_t end, const T* sums) {
    T* to = grad_weight + phase * out_channels * in_channels * 8;
    for (int64_t m = begin; m < end; ++m) {
      for (int64_t half = 0; half < panel; half += lanes) {
        typename Vector<T>::type t[kPoints];
        for (int i = 0; i < kPoints; ++i) t[i] = load(sums + (i * rows + m) * panel + half);
        transform_upconv_weight_gradient(t, to, in_channels, out_channels, item / cuts * panel + half,
                                         item % cuts * rows + m);
      }
    }
  };
#pragma omp parallel num_threads(threads)
  for (int phase = 0; phase < kPhases; ++phase) {
    int64_t voxels[kPoints], next[kPoints];
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = tiles.total * group / groups, total = tiles.total * (group + 1) / groups - begin;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < total; ++i) {
        const int64_t tile = begin + i, after = begin + std::min(i + 1, total - 1);
        tiles.gathered(tile, phase, voxels);
        tiles.gathered(after, phase, next);
        for (int64_t r = 0; r < cuts; ++r) {
          const int64_t count = std::min(rows, in_channels - r * rows);
          prefetch<T, kPoints>(next, x + r * rows, in_channels, count);
          transform_inputs(voxels, x + r * rows, in_channels, count,
                           inputs.data + r * kPoints * input_stride + i * rows, input_stride);
        }
        tiles.written(tile, phase, voxels);
        tiles.written(after, phase, next);
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t count = std::min(panel, out_channels - p * panel);
          prefetch<T, kUpconvOutputs>(next, grad + p * panel, out_channels, count);
          transform_upconv_gradients(voxels, grad, out_channels, p * panel, (p + 1) * panel,
                                     gradients.data + p * kPoints * gradient_stride + i * panel, gradient_stride);
        }
      }
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t item = 0; item < items; ++item) {
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const int64_t p = item / cuts, r = item % cuts, count = std::min(rows, in_channels - r * rows);
          const int64_t parts = (count + REGISTER_ROWS - 1) / REGISTER_ROWS;
          T* sums = all_sums.data + (groups > 1 ? item : thread_number()) * size;
          for (int64_t point = kPoints * piece / pieces; point < kPoints * (piece + 1) / pieces; ++point) {
            const T* from = inputs.data + (r * kPoints + point) * input_stride;
            const T* g = gradients.data + (p * kPoints + point) * gradient_stride;
            T* sum = sums + point * rows * panel;
            if (group == 0) std::fill_n(sum, rows * panel, T(0));
            for (int64_t part = 0; part < parts; ++part) {
              const int64_t m = count * part / parts, end = count * (part + 1) / parts;
              correlate_rows<T, REGISTER_ROWS>(end - m, total, from + m, rows, source.data(), g, panel, target.data(),
                                               sum + m * panel);
            }
          }
          if (pieces == 1) finish(phase, item, 0, count, sums);
        }
      }
    }
    if (groups == 1) continue;
#pragma omp for schedule(static)
    for (int64_t line = 0; line < items * rows; ++line) {
      const int64_t item = line / rows, m = line % rows;
      if (item % cuts * rows + m < in_channels) finish(phase, item, m, m + 1, all_sums.data + item * size);
    }
  }
}
