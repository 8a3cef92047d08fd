// Convolution over pairs: (written voxel, tap) whose gathered voxel is visible. Included once per instruction set, inside
// its namespace, with VECTOR_BYTES and REGISTER_ROWS defined.

// A tile is a few whole rows (along the width) of written voxels. Its accumulators for one panel of NR channels stay in
// the L1 cache; for every tap its pairs are listed and multiplied REGISTER_ROWS at a time with the tap's weights.
constexpr int64_t kTileVoxels = 96;

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(VECTOR_BYTES), may_alias));
  // In tensors. Template parameters drop this attribute, so what a `V*` points to is of the type above.
  typedef T unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(alignof(T)), may_alias));
  static constexpr int64_t lanes = VECTOR_BYTES / sizeof(T);
  static constexpr int64_t panel = 2 * lanes;
};

template <typename T>
inline typename Vector<T>::type load(const T* p) {
  return *reinterpret_cast<const typename Vector<T>::unaligned*>(p);
}
template <typename T>
inline void store(T* p, typename Vector<T>::type v) {
  *reinterpret_cast<typename Vector<T>::unaligned*>(p) = v;
}

// Large buffers of finished calls, kept for the next ones of the same thread: fresh memory costs a page fault for every
// 4 KiB, which takes longer than many a kernel on small blocks.
class Spare {
 public:
  static Spare& of_this_thread() {
    static thread_local Spare spare;
    return spare;
  }
  ~Spare() {
    for (const Block& block : blocks_) release(block.data);
  }

  struct Block {
    void* data;
    size_t bytes;
  };

  // The smallest block that is large enough, or a new one.
  Block take(size_t bytes) {
    auto best = blocks_.end();
    for (auto it = blocks_.begin(); it != blocks_.end(); ++it) {
      if (it->bytes >= bytes && (best == blocks_.end() || it->bytes < best->bytes)) best = it;
    }
    if (best == blocks_.end()) return {::operator new(bytes, std::align_val_t(64)), bytes};
    const Block block = *best;
    kept_ -= block.bytes;
    blocks_.erase(best);
    return block;
  }

  void give(Block block) {
    constexpr size_t most = size_t(48) << 20;
    while (!blocks_.empty() && kept_ + block.bytes > most) {
      kept_ -= blocks_.front().bytes;
      release(blocks_.front().data);
      blocks_.erase(blocks_.begin());
    }
    if (kept_ + block.bytes > most) return release(block.data);
    kept_ += block.bytes;
    blocks_.push_back(block);
  }

 private:
  static void release(void* data) { ::operator delete(data, std::align_val_t(64)); }
  std::vector<Block> blocks_;
  size_t kept_ = 0;
};

template <typename T>
struct AlignedBuffer {
  explicit AlignedBuffer(int64_t size) : block(Spare::of_this_thread().take(std::max<int64_t>(size, 1) * sizeof(T))) {
    data = static_cast<T*>(block.data);
  }
  ~AlignedBuffer() { Spare::of_this_thread().give(block); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  Spare::Block block;
  T* data;
};

inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// A buffer for every thread, allocated before they start: an exception must not leave a parallel region.
template <typename T>
struct BufferPerThread {
  BufferPerThread(int threads, int64_t size) : size((size + 15) / 16 * 16 + 16), all(threads * this->size) {}
  T* mine() const { return all.data + thread_number() * size; }
  int64_t size;
  AlignedBuffer<T> all;
};

// The pairs of one tile, tap by tap.
class Pairs {
 public:
  Pairs(const Window& window, const Locator& locator, int64_t capacity)
      : window_(window), locator_(locator), source(capacity), target(capacity) {}

  // Lists the pairs of `tap` in rows [first, last) (a row: written voxels along the width). Appends from `begin` on and
  // returns the end. `source` gets gathered voxels, `target` written voxels counted from the tile's first.
  int64_t list(int64_t tap, int64_t first, int64_t last, int64_t begin) {
    const bool all = window_.written_voxels == nullptr && window_.gathered_voxels == nullptr;
    int64_t end = begin;
    for_each_run(tap, first, last, [&](int64_t from, int64_t to, const Run& run) {
      if (all) {
        for (int64_t i = 0; i < run.count; ++i) {
          source[end + i] = from + i * run.local_step;
          target[end + i] = static_cast<int32_t>(to + i * run.step);
        }
        end += run.count;
        return;
      }
      for (int64_t i = 0; i < run.count; ++i) {
        if (!is_pair(from + i * run.local_step, first * window_.written_block.w + to + i * run.step)) continue;
        source[end] = from + i * run.local_step;
        target[end++] = static_cast<int32_t>(to + i * run.step);
      }
    });
    return end;
  }

  // Calls use(gathered voxel, written voxel counted from the tile's first, run) for each run of these pairs; single voxels
  // of it may be masked.
  template <typename Use>
  void for_each_run(int64_t tap, int64_t first, int64_t last, const Use& use) const {
    const Window& w = window_;
    const int64_t rows = w.written_block.d * w.written_block.h, width = w.written_block.w;
    const int64_t tap_x = tap % w.kernel.w, tap_y = tap / w.kernel.w % w.kernel.h, tap_z = tap / w.kernel.w / w.kernel.h;
    const std::vector<Run>& runs = locator_.along_width(tap_x);
    const int64_t span_h = 2 * w.radius.h + 1, span_w = 2 * w.radius.w + 1;
    for (int64_t row = first; row < last; ++row) {
      const int64_t block = row / rows, z = row % rows / w.written_block.h, y = row % w.written_block.h;
      const Source at_z = locator_.at(0, tap_z, z), at_y = locator_.at(1, tap_y, y);
      if (at_z.block < 0 || at_y.block < 0) continue;
      const int32_t* neighbours = w.table + block * w.columns() + (at_z.block * span_h + at_y.block) * span_w;
      for (const Run& run : runs) {
        const int64_t neighbour = neighbours[run.block];
        if (neighbour < 0) continue;
        const int64_t plane = (neighbour * w.gathered_block.d + at_z.local) * w.gathered_block.h + at_y.local;
        use(plane * w.gathered_block.w + run.local, (row - first) * width + run.first, run);
      }
    }
  }

  bool is_pair(int64_t gathered, int64_t written) const {
    if (window_.written_voxels != nullptr && !window_.written_voxels[written]) return false;
    return window_.gathered_voxels == nullptr || window_.gathered_voxels[gathered];
  }

 private:
  const Window& window_;
  const Locator& locator_;

 public:
  std::vector<int64_t> source;
  std::vector<int32_t> target;
};

inline int64_t rows_per_tile(const Window& window) {
  return std::max<int64_t>(1, kTileVoxels / window.written_block.w);
}

// accumulators[target[i]] += x[source[i]] * weights for M pairs and one panel, over `depth` gathered channels.
template <typename T, int M>
inline void multiply_group(const T* x, int64_t stride, const int64_t* source, const int32_t* target, const T* weights,
                           int64_t depth, T* accumulators) {
  constexpr int64_t lanes = Vector<T>::lanes, panel = Vector<T>::panel;
  typename Vector<T>::type sum[M][2];
  const T* rows[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    rows[i] = x + source[i] * stride;
    sum[i][0] = load(accumulators + target[i] * panel);
    sum[i][1] = load(accumulators + target[i] * panel + lanes);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const auto low = load(weights + k * panel), high = load(weights + k * panel + lanes);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const T value = rows[i][k];
      sum[i][0] += value * low;
      sum[i][1] += value * high;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    store(accumulators + target[i] * panel, sum[i][0]);
    store(accumulators + target[i] * panel + lanes, sum[i][1]);
  }
}

template <typename T, int M>
inline void multiply_rest(int64_t count, const T* x, int64_t stride, const int64_t* source, const int32_t* target,
                          const T* weights, int64_t depth, T* accumulators) {
  if constexpr (M > 0) {
    if (count == M) return multiply_group<T, M>(x, stride, source, target, weights, depth, accumulators);
    multiply_rest<T, M - 1>(count, x, stride, source, target, weights, depth, accumulators);
  }
}

template <typename T>
void multiply_pairs(int64_t count, const T* x, int64_t stride, const int64_t* source, const int32_t* target,
                    const T* weights, int64_t depth, T* accumulators) {
  int64_t i = 0;
  for (; i + REGISTER_ROWS <= count; i += REGISTER_ROWS) {
    multiply_group<T, REGISTER_ROWS>(x, stride, source + i, target + i, weights, depth, accumulators);
  }
  multiply_rest<T, REGISTER_ROWS - 1>(count - i, x, stride, source + i, target + i, weights, depth, accumulators);
}

// y [M, y_stride] (one panel) = x [M, x_stride] * weights [depth, NR], or with ADD, += it.
template <typename T, bool ADD, int M>
inline void product_group(const T* x, int64_t x_stride, int64_t depth, const T* weights, T* y, int64_t y_stride) {
  constexpr int64_t lanes = Vector<T>::lanes, panel = Vector<T>::panel;
  typename Vector<T>::type sum[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    sum[i][0] = ADD ? load(y + i * y_stride) : typename Vector<T>::type{};
    sum[i][1] = ADD ? load(y + i * y_stride + lanes) : typename Vector<T>::type{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const auto low = load(weights + k * panel), high = load(weights + k * panel + lanes);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const T value = x[i * x_stride + k];
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

template <typename T, bool ADD, int M>
inline void product_rest(int64_t count, const T* x, int64_t x_stride, int64_t depth, const T* weights, T* y,
                         int64_t y_stride) {
  if constexpr (M > 0) {
    if (count == M) return product_group<T, ADD, M>(x, x_stride, depth, weights, y, y_stride);
    product_rest<T, ADD, M - 1>(count, x, x_stride, depth, weights, y, y_stride);
  }
}

// The same for any number of rows.
template <typename T, bool ADD>
inline void product(int64_t count, const T* x, int64_t x_stride, int64_t depth, const T* weights, T* y,
                    int64_t y_stride) {
  int64_t i = 0;
  for (; i + REGISTER_ROWS <= count; i += REGISTER_ROWS) {
    product_group<T, ADD, REGISTER_ROWS>(x + i * x_stride, x_stride, depth, weights, y + i * y_stride, y_stride);
  }
  product_rest<T, ADD, REGISTER_ROWS - 1>(count - i, x + i * x_stride, x_stride, depth, weights, y + i * y_stride, y_stride);
}

#if defined(__clang__) || __GNUC__ >= 12
constexpr bool kTransposes = true;

// Both halves of a0 b0 a1 b1 ...
template <typename V, size_t... I>
inline void interleave(V a, V b, V* low, V* high, std::index_sequence<I...>) {
  constexpr int lanes = sizeof...(I);
  *low = __builtin_shufflevector(a, b, (I / 2 + I % 2 * lanes)...);
  *high = __builtin_shufflevector(a, b, (lanes / 2 + I / 2 + I % 2 * lanes)...);
}

// rows[i * row_stride + j] to columns[j * column_stride + i] for i, j in [0, lanes).
template <typename T>
inline void transpose(const T* rows, int64_t row_stride, T* columns, int64_t column_stride) {
  constexpr int lanes = Vector<T>::lanes;
  typename Vector<T>::type a[lanes], b[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) a[i] = load(rows + i * row_stride);
#pragma GCC unroll 4
  for (int round = 1; round < lanes; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      interleave(a[i], a[i + lanes / 2], &b[2 * i], &b[2 * i + 1], std::make_index_sequence<lanes>());
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int j = 0; j < lanes; ++j) store(columns + j * column_stride, a[j]);
}

template <typename V, typename H, size_t... I>
inline V joined(H low, H high, std::index_sequence<I...>) {
  return __builtin_shufflevector(low, high, I...);
}
template <typename H, typename V, size_t... I>
inline void split(V v, H* low, H* high, std::index_sequence<I...>) {
  *low = __builtin_shufflevector(v, v, I...);
  *high = __builtin_shufflevector(v, v, (sizeof...(I) + I)...);
}

// The same for rows half as long as a vector: `lanes` rows to lanes / 2 columns of `lanes` values, and back. Two rows are
// one vector; interleaving a row of vectors with its second half moves the highest bit of each value's place to the lowest.
template <typename T>
struct Halves {
  static constexpr int lanes = Vector<T>::lanes, half = lanes / 2;
  using V = typename Vector<T>::type;
  typedef T H __attribute__((vector_size(VECTOR_BYTES / 2), may_alias));
  typedef T UnalignedH __attribute__((vector_size(VECTOR_BYTES / 2), aligned(alignof(T)), may_alias));

  static void interleave_rounds(V* a, int bits) {
    if constexpr (half == 1) return;
    V b[half];
#pragma GCC unroll 4
    for (int round = 1; round < bits; round *= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < half / 2; ++i) {
        interleave(a[i], a[i + half / 2], &b[2 * i], &b[2 * i + 1], std::make_index_sequence<lanes>());
      }
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) a[i] = b[i];
    }
  }
  static void to_columns(const T* rows, int64_t row_stride, T* columns, int64_t column_stride) {
    V a[half];
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      const H low = *reinterpret_cast<const UnalignedH*>(rows + 2 * i * row_stride);
      const H high = *reinterpret_cast<const UnalignedH*>(rows + (2 * i + 1) * row_stride);
      a[i] = joined<V>(low, high, std::make_index_sequence<lanes>());
    }
    interleave_rounds(a, lanes);
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) store(columns + i * column_stride, a[i]);
  }
  static void to_rows(V* columns, T* rows, int64_t row_stride) {
    interleave_rounds(columns, half);
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      H low, high;
      split(columns[i], &low, &high, std::make_index_sequence<half>());
      *reinterpret_cast<UnalignedH*>(rows + 2 * i * row_stride) = low;
      *reinterpret_cast<UnalignedH*>(rows + (2 * i + 1) * row_stride) = high;
    }
  }
};
#else
constexpr bool kTransposes = false;
template <typename T>
inline void transpose(const T*, int64_t, T*, int64_t) {}
template <typename T>
struct Halves {
  static void to_columns(const T*, int64_t, T*, int64_t) {}
  static void to_rows(typename Vector<T>::type*, T*, int64_t) {}
};
#endif

// Gathered channels [begin, end) of panel p of one group's weight, in the order in which they are multiplied: [tap,
// channel, NR], zeros beyond; `stride` values from tap to tap.
template <typename T>
void pack_panel(const T* weight, bool transposed, int64_t taps, int64_t in_channels, int64_t out_channels, int64_t p,
                int64_t begin, int64_t end, T* packed, int64_t stride) {
  constexpr int64_t lanes = Vector<T>::lanes, panel = Vector<T>::panel;
  const int64_t filled = std::min(panel, (transposed ? in_channels : out_channels) - p * panel);
  // Of one gathered channel: rows of the panel's channels, taps side by side.
  const int64_t row = transposed ? taps : in_channels * taps, step = transposed ? in_channels * taps : taps;
  for (int64_t k = begin; k < end; ++k) {
    const T* rows = weight + p * panel * row + k * step;
    T* lines = packed + (k - begin) * panel;
    if (kTransposes && filled == panel && taps >= lanes) {
      for (int64_t tap = 0; tap < taps; tap += lanes) {
        const int64_t first = std::min(tap, taps - lanes);  // the last ones overlap those before
        for (int64_t j = 0; j < panel; j += lanes) {
          transpose(rows + j * row + first, row, lines + first * stride + j, stride);
        }
      }
      continue;
    }
    if (kTransposes && filled == panel && 2 * taps == lanes) {
      for (int64_t j = 0; j < panel; j += lanes) Halves<T>::to_columns(rows + j * row, row, lines + j, stride);
      continue;
    }
    for (int64_t tap = 0; tap < taps; ++tap) {
      T* line = lines + tap * stride;
      for (int64_t j = 0; j < filled; ++j) line[j] = rows[j * row + tap];
      for (int64_t j = filled; j < panel; ++j) line[j] = 0;
    }
  }
}

// The whole of it: [tap, panel, gathered channel, NR].
template <typename T>
void pack_weights(const T* weight, bool transposed, int64_t taps, int64_t in_channels, int64_t out_channels,
                  T* packed, int threads) {
  constexpr int64_t panel = Vector<T>::panel;
  const int64_t depth = transposed ? out_channels : in_channels, wide = transposed ? in_channels : out_channels;
  const int64_t panels = (wide + panel - 1) / panel;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t k = 0; k < depth; ++k) {
      pack_panel(weight, transposed, taps, in_channels, out_channels, p, k, k + 1, packed + (p * depth + k) * panel,
                 panels * depth * panel);
    }
  }
}

// Sums of one panel before the first product, and their way into the output.
template <typename T>
void start_sums(const T* bias, int64_t filled, int64_t voxels, T* sums) {
  constexpr int64_t panel = Vector<T>::panel;
  for (int64_t v = 0; v < voxels; ++v) {
    for (int64_t j = 0; j < panel; ++j) sums[v * panel + j] = bias != nullptr && j < filled ? bias[j] : 0;
  }
}

template <typename T>
void write_sums(const T* sums, const uint8_t* visible, int64_t filled, int64_t voxels, T* out, int64_t stride) {
  constexpr int64_t panel = Vector<T>::panel;
  for (int64_t v = 0; v < voxels; ++v) {
    if (visible != nullptr && !visible[v]) {
      std::fill_n(out + v * stride, filled, T(0));
    } else if (filled == panel) {
      store(out + v * stride, load(sums + v * panel));
      store(out + v * stride + panel / 2, load(sums + v * panel + panel / 2));
    } else {
      std::copy_n(sums + v * panel, filled, out + v * stride);
    }
  }
}

template <typename T>
void conv3d_depthwise(const Window& window, const T* gathered, const T* weight, const T* bias, T* written,
                      int64_t channels, int threads) {
  const Locator locator(window);
  const int64_t width = window.written_block.w, taps = window.taps();
  const int64_t rows = window.written_rows * window.written_block.d * window.written_block.h;
  const int64_t tile = rows_per_tile(window), tiles = (rows + tile - 1) / tile;
  std::vector<T> by_tap(taps * channels);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t tap = 0; tap < taps; ++tap) by_tap[tap * channels + c] = weight[c * taps + tap];
  }
  std::vector<Pairs> all_pairs(threads, Pairs(window, locator, tile * width));
#pragma omp parallel num_threads(threads)
  {
    Pairs& pairs = all_pairs[thread_number()];
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = t * tile, last = std::min(rows, first + tile);
      T* out = written + first * width * channels;
      for (int64_t v = 0; v < (last - first) * width; ++v) {
        const bool visible = window.written_voxels == nullptr || window.written_voxels[first * width + v];
        for (int64_t c = 0; c < channels; ++c) out[v * channels + c] = bias != nullptr && visible ? bias[c] : 0;
      }
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t count = pairs.list(tap, first, last, 0);
        const T* factor = by_tap.data() + tap * channels;
        for (int64_t i = 0; i < count; ++i) {
          const T* x = gathered + pairs.source[i] * channels;
          T* y = out + pairs.target[i] * channels;
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) y[c] += x[c] * factor[c];
        }
      }
    }
  }
}

// Below so many voxels a kernel of few.inl computes.
constexpr int64_t kFewVoxels = 32;

template <typename T>
void conv3d_few_forward(const Window&, const T* gathered, const T* weight, const T* bias, T* written,
                        int64_t in_channels, int64_t out_channels, int64_t groups, int threads);
template <typename T>
void conv3d_few_transposed(const Window&, const T* gathered, const T* weight, const T* bias, T* written,
                           int64_t in_channels, int64_t out_channels, int64_t groups, int threads);
template <typename T>
void conv3d_grad_weight_few(const Window&, const T* grad, const T* x, T* grad_weight, int64_t in_channels,
                            int64_t out_channels, int64_t groups, int threads);

// And of so few gathered channels one of shallow.inl.
inline bool is_shallow(const Window& window, int64_t in_group) {
  return !window.transposed && in_group <= 4 && window.taps() * in_group <= 128;
}

template <typename T>
void conv3d_shallow(const Window&, const T* gathered, const T* weight, const T* bias, T* written, int64_t in_channels,
                    int64_t out_channels, int64_t groups, int threads);
template <typename T>
void conv3d_grad_weight_shallow(const Window&, const T* grad, const T* x, T* grad_weight, int64_t in_channels,
                                int64_t out_channels, int64_t groups, int threads);

// Where voxels are not many more than a few tiles, a packed weight would be written to memory and read back a few times. So
// a panel is packed slice by slice of the gathered channels, each slice used at once, in the cache, for all voxels.
constexpr int64_t kVoxelsOfPanel = 1024, kSliceBytes = int64_t(128) << 10;

template <typename T>
void conv3d_by_panel(const Window& window, const T* gathered, const T* weight, const T* bias, T* written,
                     int64_t in_channels, int64_t out_channels, int64_t groups, int threads) {
  constexpr int64_t panel = Vector<T>::panel;
  const Locator locator(window);
  const int64_t taps = window.taps(), width = window.written_block.w;
  const int64_t in_group = in_channels / groups, out_group = out_channels / groups;
  const int64_t depth = window.transposed ? out_group : in_group, wide = window.transposed ? in_group : out_group;
  const int64_t gathered_channels = depth * groups, written_channels = wide * groups;
  const int64_t panels = (wide + panel - 1) / panel, all_panels = panels * groups;
  const int64_t rows = window.written_rows * window.written_block.d * window.written_block.h;
  // More threads than panels share the voxels; a result does not depend on how they are cut.
  const int64_t cuts = std::clamp<int64_t>((2 * threads + all_panels - 1) / all_panels, 1, rows);
  const int64_t most = (rows + cuts - 1) / cuts * width;
  const int64_t slice = std::clamp<int64_t>(kSliceBytes / static_cast<int64_t>(taps * panel * sizeof(T)), 1, depth);
  const int64_t stride = (slice + 1) * panel;  // so that taps do not fall on the same lines of the cache
  const BufferPerThread<T> all_packed(threads, taps * stride), all_sums(threads, most * panel);
  std::vector<Pairs> all_pairs(threads, Pairs(window, locator, taps * most));
  std::vector<int64_t> all_begins(threads * (taps + 1));
#pragma omp parallel num_threads(threads)
  {
    Pairs& pairs = all_pairs[thread_number()];
    int64_t* begin = all_begins.data() + thread_number() * (taps + 1);
    T *packed = all_packed.mine(), *sums = all_sums.mine();
    int64_t listed = -1;
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t cut = 0; cut < cuts; ++cut) {
      for (int64_t item = 0; item < all_panels; ++item) {
        const int64_t first = rows * cut / cuts, last = rows * (cut + 1) / cuts, voxels = (last - first) * width;
        if (listed != cut) {
          for (int64_t tap = 0; tap < taps; ++tap) begin[tap + 1] = pairs.list(tap, first, last, begin[tap]);
          listed = cut;
        }
        const int64_t group = item / panels, p = item % panels;
        const int64_t filled = std::min(panel, wide - p * panel), channel = group * wide + p * panel;
        start_sums(bias == nullptr ? nullptr : bias + channel, filled, voxels, sums);
        for (int64_t k = 0; k < depth; k += slice) {
          const int64_t end = std::min(depth, k + slice);
          pack_panel(weight + group * out_group * in_group * taps, window.transposed, taps, in_group, out_group, p, k,
                     end, packed, stride);
          for (int64_t tap = 0; tap < taps; ++tap) {
            multiply_pairs(begin[tap + 1] - begin[tap], gathered + group * depth + k, gathered_channels,
                           pairs.source.data() + begin[tap], pairs.target.data() + begin[tap], packed + tap * stride,
                           end - k, sums);
          }
        }
        write_sums(sums, window.written_voxels == nullptr ? nullptr : window.written_voxels + first * width, filled,
                   voxels, written + first * width * written_channels + channel, written_channels);
      }
    }
  }
}

template <typename T>
void conv3d(const Window& window, const T* gathered, const T* weight, const T* bias, T* written, int64_t in_channels,
            int64_t out_channels, int64_t groups, int threads) {
  constexpr int64_t panel = Vector<T>::panel;
  if (groups == in_channels && groups == out_channels) {
    return conv3d_depthwise(window, gathered, weight, bias, written, groups, threads);
  }
  const int64_t written_count = window.written_rows * window.written_block.volume();
  const int64_t gathered_count = window.gathered_rows * window.gathered_block.volume();
  if (written_count > 0 && (window.transposed ? gathered_count : written_count) < kFewVoxels) {
    const auto few = window.transposed ? conv3d_few_transposed<T> : conv3d_few_forward<T>;
    return few(window, gathered, weight, bias, written, in_channels, out_channels, groups, threads);
  }
  if (is_shallow(window, in_channels / groups)) {
    return conv3d_shallow(window, gathered, weight, bias, written, in_channels, out_channels, groups, threads);
  }
  if (written_count > 0 && written_count <= kVoxelsOfPanel) {
    return conv3d_by_panel(window, gathered, weight, bias, written, in_channels, out_channels, groups, threads);
  }
  const Locator locator(window);
  const int64_t taps = window.taps(), width = window.written_block.w;
  const int64_t in_group = in_channels / groups, out_group = out_channels / groups;
  const int64_t depth = window.transposed ? out_group : in_group, wide = window.transposed ? in_group : out_group;
  const int64_t gathered_channels = depth * groups, written_channels = wide * groups;
  const int64_t panels = (wide + panel - 1) / panel;
  const int64_t rows = window.written_rows * window.written_block.d * window.written_block.h;
  const int64_t tile = rows_per_tile(window), tiles = (rows + tile - 1) / tile;
  // Enough work items for all threads also where there are few tiles; a result does not depend on how they are cut.
  const int64_t wanted = 8 * threads;
  const int64_t per_item = std::clamp<int64_t>(panels * tiles / wanted, 1, panels);
  const int64_t pieces = (panels + per_item - 1) / per_item;
  AlignedBuffer<T> packed(taps * panels * depth * panel);
  const BufferPerThread<T> all_accumulators(threads, tile * width * panel);
  std::vector<Pairs> all_pairs(threads, Pairs(window, locator, taps * tile * width));
  std::vector<int64_t> all_begins(threads * (taps + 1));
  for (int64_t group = 0; group < groups; ++group) {
    pack_weights(weight + group * out_group * in_group * taps, window.transposed, taps, in_group, out_group,
                 packed.data, threads);
    const T* x = gathered + group * depth;
#pragma omp parallel num_threads(threads)
    {
      Pairs& pairs = all_pairs[thread_number()];
      int64_t* begin = all_begins.data() + thread_number() * (taps + 1);
      T* sums = all_accumulators.mine();
      int64_t listed = -1;
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t t = 0; t < tiles; ++t) {
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const int64_t first = t * tile, last = std::min(rows, first + tile), voxels = (last - first) * width;
          if (listed != t) {
            for (int64_t tap = 0; tap < taps; ++tap) begin[tap + 1] = pairs.list(tap, first, last, begin[tap]);
            listed = t;
          }
          for (int64_t p = piece * per_item; p < std::min(panels, (piece + 1) * per_item); ++p) {
            const int64_t filled = std::min(panel, wide - p * panel), channel = group * wide + p * panel;
            start_sums(bias == nullptr ? nullptr : bias + channel, filled, voxels, sums);
            for (int64_t tap = 0; tap < taps; ++tap) {
              const T* weights = packed.data + (tap * panels + p) * depth * panel;
              multiply_pairs(begin[tap + 1] - begin[tap], x, gathered_channels, pairs.source.data() + begin[tap],
                             pairs.target.data() + begin[tap], weights, depth, sums);
            }
            write_sums(sums, window.written_voxels == nullptr ? nullptr : window.written_voxels + first * width, filled,
                       voxels, written + first * width * written_channels + channel, written_channels);
          }
        }
      }
    }
  }
}

// sums[m, NR] += x[source[i], m] * grad[target[i], NR] over all pairs, for M gathered channels.
template <typename T, int M>
inline void correlate_group(int64_t count, const T* x, int64_t x_stride, const int64_t* source, const T* grad,
                            int64_t grad_stride, const int32_t* target, T* sums) {
  constexpr int64_t lanes = Vector<T>::lanes, panel = Vector<T>::panel;
  typename Vector<T>::type sum[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = typename Vector<T>::type{};
  for (int64_t i = 0; i < count; ++i) {
    const T* row = x + source[i] * x_stride;
    const T* g = grad + target[i] * grad_stride;
    const auto low = load(g), high = load(g + lanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const T value = row[m];
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

template <typename T, int M>
inline void correlate_rows(int64_t rows, int64_t count, const T* x, int64_t x_stride, const int64_t* source,
                           const T* grad, int64_t grad_stride, const int32_t* target, T* sums) {
  if constexpr (M > 0) {
    if (rows == M) return correlate_group<T, M>(count, x, x_stride, source, grad, grad_stride, target, sums);
    correlate_rows<T, M - 1>(rows, count, x, x_stride, source, grad, grad_stride, target, sums);
  }
}

template <typename T>
void conv3d_grad_weight_depthwise(const Window& window, const T* grad, const T* x, T* grad_weight, int64_t channels,
                                  int threads) {
  const Locator locator(window);
  const int64_t width = window.written_block.w, taps = window.taps();
  const int64_t rows = window.written_rows * window.written_block.d * window.written_block.h;
  const int64_t tile = rows_per_tile(window);
  std::vector<Pairs> all_pairs(threads, Pairs(window, locator, tile * width));
  const BufferPerThread<T> all_sums(threads, channels), all_parts(threads, channels);
#pragma omp parallel num_threads(threads)
  {
    Pairs& pairs = all_pairs[thread_number()];
    T *sums = all_sums.mine(), *part = all_parts.mine();
#pragma omp for schedule(dynamic)
    for (int64_t tap = 0; tap < taps; ++tap) {
      std::fill_n(sums, channels, T(0));
      for (int64_t first = 0; first < rows; first += tile) {
        const int64_t count = pairs.list(tap, first, std::min(rows, first + tile), 0);
        std::fill_n(part, channels, T(0));  // tile by tile, so that rounding does not grow with the volume
        for (int64_t i = 0; i < count; ++i) {
          const T* from = x + pairs.source[i] * channels;
          const T* g = grad + (first * width + pairs.target[i]) * channels;
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) part[c] += from[c] * g[c];
        }
        for (int64_t c = 0; c < channels; ++c) sums[c] += part[c];
      }
      for (int64_t c = 0; c < channels; ++c) grad_weight[c * taps + tap] = sums[c];
    }
  }
}

// The gradient of a weight where voxels are few: it is written once, from registers, a few channels at a time.
template <typename T>
void conv3d_grad_weight_small(const Window& window, const T* grad, const T* x, T* grad_weight, int64_t in_channels,
                              int64_t out_channels, int64_t groups, int threads) {
  constexpr int64_t panel = Vector<T>::panel;
  const Locator locator(window);
  const int64_t taps = window.taps(), width = window.written_block.w;
  const int64_t in_group = in_channels / groups, out_group = out_channels / groups;
  const int64_t panels = (out_group + panel - 1) / panel;
  const int64_t row_groups = (in_group + REGISTER_ROWS - 1) / REGISTER_ROWS;
  const int64_t rows = window.written_rows * window.written_block.d * window.written_block.h;
  const int64_t tile = rows_per_tile(window), tiles = (rows + tile - 1) / tile;
  Pairs pairs(window, locator, taps * rows * width);
  std::vector<int64_t> begin(tiles * taps + 1);
  for (int64_t t = 0, end = 0; t < tiles; ++t) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      end = pairs.list(tap, t * tile, std::min(rows, (t + 1) * tile), end);
      begin[t * taps + tap + 1] = end;
    }
  }
  const BufferPerThread<T> all_sums(threads, taps * REGISTER_ROWS * panel), all_rests(threads, tile * width * panel);
#pragma omp parallel num_threads(threads)
  {
    T *sums = all_sums.mine(), *rest = all_rests.mine();
#pragma omp for collapse(3) schedule(dynamic)
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t p = 0; p < panels; ++p) {
        for (int64_t r = 0; r < row_groups; ++r) {
          const int64_t first = in_group * r / row_groups, count = in_group * (r + 1) / row_groups - first;
          const int64_t filled = std::min(panel, out_group - p * panel);
          std::fill_n(sums, taps * REGISTER_ROWS * panel, T(0));
          for (int64_t t = 0; t < tiles; ++t) {
            const T* g = grad + t * tile * width * out_channels + group * out_group + p * panel;
            int64_t stride = out_channels;
            if (filled < panel) {
              // Vectors must not reach beyond the last channel.
              const int64_t voxels = std::min(tile, rows - t * tile) * width;
              for (int64_t v = 0; v < voxels; ++v) {
                std::fill_n(rest + v * panel, panel, T(0));
                std::copy_n(g + v * stride, filled, rest + v * panel);
              }
              g = rest;
              stride = panel;
            }
            for (int64_t tap = 0; tap < taps; ++tap) {
              const int64_t from = begin[t * taps + tap], pairs_of_tap = begin[t * taps + tap + 1] - from;
              if (pairs_of_tap == 0) continue;
              correlate_rows<T, REGISTER_ROWS>(count, pairs_of_tap, x + group * in_group + first, in_channels,
                                               pairs.source.data() + from, g, stride, pairs.target.data() + from,
                                               sums + tap * REGISTER_ROWS * panel);
            }
          }
          for (int64_t j = 0; j < filled; ++j) {
            T* out = grad_weight + ((group * out_group + p * panel + j) * in_group + first) * taps;
            for (int64_t m = 0; m < count; ++m) {
              for (int64_t tap = 0; tap < taps; ++tap) {
                out[m * taps + tap] = sums[(tap * REGISTER_ROWS + m) * panel + j];
              }
            }
          }
        }
      }
    }
  }
}

template <typename T>
void conv3d_grad_weight(const Window& window, const T* grad, const T* x, T* grad_weight, int64_t in_channels,
                        int64_t out_channels, int64_t groups, int threads) {
  constexpr int64_t panel = Vector<T>::panel;
  if (groups == in_channels && groups == out_channels) {
    return conv3d_grad_weight_depthwise(window, grad, x, grad_weight, groups, threads);
  }
  const int64_t voxels = window.written_rows * window.written_block.volume();
  if (voxels > 0 && voxels < kFewVoxels) {
    return conv3d_grad_weight_few(window, grad, x, grad_weight, in_channels, out_channels, groups, threads);
  }
  if (is_shallow(window, in_channels / groups)) {
    return conv3d_grad_weight_shallow(window, grad, x, grad_weight, in_channels, out_channels, groups, threads);
  }
  if (voxels < 4096) {
    return conv3d_grad_weight_small(window, grad, x, grad_weight, in_channels, out_channels, groups, threads);
  }
  const Locator locator(window);
  const int64_t taps = window.taps(), width = window.written_block.w;
  const int64_t in_group = in_channels / groups, out_group = out_channels / groups;
  const int64_t panels = (out_group + panel - 1) / panel;
  const int64_t rows = window.written_rows * window.written_block.d * window.written_block.h;
  const int64_t tile = rows_per_tile(window), tiles = (rows + tile - 1) / tile;
  // Voxels are cut into parts that depend on the problem alone, so that results do not depend on the threads. Where there
  // are many voxels all taps of a part are done while it is in the cache; where there are few, taps and panels are the work.
  const int64_t size = taps * panels * in_group * panel;
  const int64_t budget = std::max<int64_t>(1, (int64_t(64) << 20) / static_cast<int64_t>(size * sizeof(T)));
  const int64_t parts = std::clamp<int64_t>(rows * width / 2048, 1, std::min<int64_t>(budget, 16));
  const int64_t wanted = 8 * threads;
  const int64_t tap_pieces = std::clamp<int64_t>((wanted + parts - 1) / parts, 1, taps);
  const int64_t panel_pieces = std::clamp<int64_t>((wanted + parts * tap_pieces - 1) / (parts * tap_pieces), 1, panels);
  const int64_t row_groups = (in_group + REGISTER_ROWS - 1) / REGISTER_ROWS;
  AlignedBuffer<T> sums(parts * size);
  // A last panel that is not full is read from a copy with zeros beside it.
  const int64_t full = out_group / panel;
  std::vector<Pairs> all_pairs(threads, Pairs(window, locator, tile * width));
  const BufferPerThread<T> all_rests(threads, tile * width * panel);
  for (int64_t group = 0; group < groups; ++group) {
#pragma omp parallel num_threads(threads)
    {
      Pairs& pairs = all_pairs[thread_number()];
      T* rest = all_rests.mine();
#pragma omp for collapse(3) schedule(dynamic)
      for (int64_t part = 0; part < parts; ++part) {
        for (int64_t tap_piece = 0; tap_piece < tap_pieces; ++tap_piece) {
          for (int64_t panel_piece = 0; panel_piece < panel_pieces; ++panel_piece) {
            const int64_t tap_begin = taps * tap_piece / tap_pieces, tap_end = taps * (tap_piece + 1) / tap_pieces;
            const int64_t p_begin = panels * panel_piece / panel_pieces;
            const int64_t p_end = panels * (panel_piece + 1) / panel_pieces;
            T* total = sums.data + part * size;
            for (int64_t tap = tap_begin; tap < tap_end; ++tap) {
              std::fill_n(total + (tap * panels + p_begin) * in_group * panel, (p_end - p_begin) * in_group * panel, T(0));
            }
            for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t) {
              const int64_t first = t * tile, last = std::min(rows, first + tile);
              const T* tile_grad = grad + first * width * out_channels + group * out_group;
              if (p_end > full) {
                for (int64_t v = 0; v < (last - first) * width; ++v) {
                  T* line = rest + v * panel;
                  std::fill_n(line, panel, T(0));
                  std::copy_n(tile_grad + v * out_channels + full * panel, out_group - full * panel, line);
                }
              }
              for (int64_t tap = tap_begin; tap < tap_end; ++tap) {
                const int64_t count = pairs.list(tap, first, last, 0);
                if (count == 0) continue;
                for (int64_t p = p_begin; p < p_end; ++p) {
                  const T* g = p < full ? tile_grad + p * panel : rest;
                  const int64_t g_stride = p < full ? out_channels : panel;
                  T* target = total + (tap * panels + p) * in_group * panel;
                  for (int64_t r = 0; r < row_groups; ++r) {
                    const int64_t begin = in_group * r / row_groups, end = in_group * (r + 1) / row_groups;
                    correlate_rows<T, REGISTER_ROWS>(end - begin, count, x + group * in_group + begin, in_channels,
                                                     pairs.source.data(), g, g_stride, pairs.target.data(),
                                                     target + begin * panel);
                  }
                }
              }
            }
          }
        }
      }
#pragma omp for collapse(2) schedule(static)
      for (int64_t p = 0; p < panels; ++p) {
        for (int64_t k = 0; k < in_group; ++k) {
          const int64_t filled = std::min(panel, out_group - p * panel);
          T* out = grad_weight + ((group * out_group + p * panel) * in_group + k) * taps;
          for (int64_t tap = 0; tap < taps; ++tap) {
            const T* line = sums.data + ((tap * panels + p) * in_group + k) * panel;
            for (int64_t j = 0; j < filled; ++j) {
              T total = line[j];
              for (int64_t part = 1; part < parts; ++part) total += line[part * size + j];
              out[j * in_group * taps + tap] = total;
            }
          }
        }
      }
    }
  }
}
