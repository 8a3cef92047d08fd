// Half precision: vectors of it, and the kernels of convolution on it. Included once per instruction set, inside its
// namespace, after the kernels for float.

template <>
struct Vector<bfloat16> : Vector<float> {};
template <>
struct Vector<float16> : Vector<float> {};

using FloatVector = Vector<float>::type;
typedef uint32_t WordVector __attribute__((vector_size(VECTOR_BYTES)));

// Words of 16 bits to those of 32, and back if they fit.
#if VECTOR_BYTES == 32 && defined(__AVX2__)
inline WordVector load_words(const void* p) {
  return reinterpret_cast<WordVector>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}
inline void store_words(void* p, WordVector words) {
  const __m256i all = reinterpret_cast<__m256i>(words);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  _mm_storeu_si128(static_cast<__m128i*>(p), packed);
}
#else
typedef uint16_t HalfVector __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint16_t UnalignedHalfVector __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
inline WordVector load_words(const void* p) {
  return __builtin_convertvector(HalfVector(*static_cast<const UnalignedHalfVector*>(p)), WordVector);
}
inline void store_words(void* p, WordVector words) {
  *static_cast<UnalignedHalfVector*>(p) = __builtin_convertvector(words, HalfVector);
}
#endif

inline FloatVector load(const bfloat16* p) { return from_bfloat16<FloatVector>(load_words(p)); }
inline void store(bfloat16* p, FloatVector v) { store_words(p, to_bfloat16<WordVector>(v)); }

#if VECTOR_BYTES == 64 && defined(__AVX512F__)
inline FloatVector load(const float16* p) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(float16* p, FloatVector v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
}
#elif VECTOR_BYTES == 32 && defined(__F16C__)
inline FloatVector load(const float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(float16* p, FloatVector v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline FloatVector load(const float16* p) { return from_float16<FloatVector>(load_words(p)); }
inline void store(float16* p, FloatVector v) { store_words(p, to_float16<WordVector>(v)); }
#endif

// A place in lines of values of any storage type T computes with: `lanes` values at once, or a single one.
template <typename T>
struct Lanes {
  template <typename S>
  typename Vector<T>::type get(const S* line) const {
    return load(line + at);
  }
  template <typename S>
  void put(S* line, typename Vector<T>::type value) const {
    store(line + at, value);
  }
  int64_t at;
};
template <typename T>
struct Single {
  template <typename S>
  T get(const S* line) const {
    return widen(line[at]);
  }
  template <typename S>
  void put(S* line, T value) const {
    line[at] = narrow<S>(value);
  }
  int64_t at;
};

// Calls use(place) for all places of a line.
template <typename T, typename Use>
inline void for_line(int64_t size, const Use& use) {
  int64_t at = 0;
  for (; at + Vector<T>::lanes <= size; at += Vector<T>::lanes) use(Lanes<T>{at});
  for (; at < size; ++at) use(Single<T>{at});
}

// A line as it is computed: itself, or widened into `room`.
template <typename S, typename T = computed<S>>
inline const T* widened(const S* line, int64_t size, T* room) {
  if constexpr (std::is_same_v<S, T>) {
    return line;
  } else {
    for_line<T>(size, [&](auto at) { at.put(room, at.get(line)); });
    return room;
  }
}

template <typename From, typename To>
void convert(const From* from, To* to, int64_t size, int threads) {
  constexpr int64_t piece = 4096;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < size; first += piece) {
    for_line<float>(std::min(piece, size - first), [&](auto at) { at.put(to + first, at.get(from + first)); });
  }
}

// A tensor of half precision as float, for the time of a call; null stays null.
template <typename S>
class InFloat {
 public:
  InFloat(const S* values, int64_t size, int threads) : null_(values == nullptr), buffer_(null_ ? 0 : size) {
    if (!null_) convert(values, buffer_.data, size, threads);
  }
  const float* data() const { return null_ ? nullptr : buffer_.data; }

 private:
  bool null_;
  AlignedBuffer<float> buffer_;
};

// What `compute` writes in float, rounded once.
template <typename S, typename Compute>
void rounded(S* values, int64_t size, int threads, const Compute& compute) {
  const AlignedBuffer<float> buffer(size);
  compute(buffer.data);
  convert(buffer.data, values, size, threads);
}

// Convolution on half precision is that on float of converted tensors: the conversion is a few percent of the time, and
// the kernels need not be compiled once more. See Kernels for the arguments.
template <typename S, typename Kernel>
void forward_in_float(const Window& window, const S* gathered, const S* weight, const S* bias, S* written,
                      int64_t in_channels, int64_t out_channels, int64_t groups, int threads, const Kernel& kernel) {
  const int64_t depth = window.transposed ? out_channels : in_channels;
  const int64_t wide = window.transposed ? in_channels : out_channels;
  const InFloat<S> x(gathered, window.gathered_rows * window.gathered_block.volume() * depth, threads);
  const InFloat<S> w(weight, out_channels * (in_channels / groups) * window.taps(), threads), b(bias, wide, threads);
  rounded(written, window.written_rows * window.written_block.volume() * wide, threads,
          [&](float* y) { kernel(x.data(), w.data(), b.data(), y); });
}

template <typename S, typename Kernel>
void grad_weight_in_float(const Window& window, const S* grad, const S* x, S* grad_weight, int64_t in_channels,
                          int64_t out_channels, int64_t groups, int threads, const Kernel& kernel) {
  const InFloat<S> g(grad, window.written_rows * window.written_block.volume() * out_channels, threads);
  const InFloat<S> from(x, window.gathered_rows * window.gathered_block.volume() * in_channels, threads);
  rounded(grad_weight, out_channels * (in_channels / groups) * window.taps(), threads,
          [&](float* w) { kernel(g.data(), from.data(), w); });
}

template <typename S>
void conv3d_half(const Window& window, const S* gathered, const S* weight, const S* bias, S* written,
                 int64_t in_channels, int64_t out_channels, int64_t groups, int threads) {
  forward_in_float(window, gathered, weight, bias, written, in_channels, out_channels, groups, threads,
                   [&](const float* x, const float* w, const float* b, float* y) {
                     conv3d(window, x, w, b, y, in_channels, out_channels, groups, threads);
                   });
}

template <typename S>
void conv3d_winograd_half(const Window& window, const S* gathered, const S* weight, const S* bias, S* written,
                          int64_t in_channels, int64_t out_channels, int threads) {
  forward_in_float(window, gathered, weight, bias, written, in_channels, out_channels, 1, threads,
                   [&](const float* x, const float* w, const float* b, float* y) {
                     conv3d_winograd(window, x, w, b, y, in_channels, out_channels, threads);
                   });
}

template <typename S>
void conv3d_grad_weight_half(const Window& window, const S* grad, const S* x, S* grad_weight, int64_t in_channels,
                             int64_t out_channels, int64_t groups, int threads) {
  grad_weight_in_float(window, grad, x, grad_weight, in_channels, out_channels, groups, threads,
                       [&](const float* g, const float* from, float* w) {
                         conv3d_grad_weight(window, g, from, w, in_channels, out_channels, groups, threads);
                       });
}

template <typename S>
void conv3d_grad_weight_winograd_half(const Window& window, const S* grad, const S* x, S* grad_weight,
                                      int64_t in_channels, int64_t out_channels, int threads) {
  grad_weight_in_float(window, grad, x, grad_weight, in_channels, out_channels, 1, threads,
                       [&](const float* g, const float* from, float* w) {
                         conv3d_grad_weight_winograd(window, g, from, w, in_channels, out_channels, threads);
                       });
}

template <typename S>
void upconv3d_half(const Upconv& u, const S* x, const S* weight, const S* bias, S* y, int threads) {
  const InFloat<S> from(x, u.inputs(), threads), w(weight, u.weights(), threads), b(bias, u.out_channels, threads);
  rounded(y, u.outputs(), threads, [&](float* to) { upconv3d(u, from.data(), w.data(), b.data(), to, threads); });
}

template <typename S>
void upconv3d_grad_input_half(const Upconv& u, const S* grad, const S* weight, S* grad_x, int threads) {
  const InFloat<S> g(grad, u.outputs(), threads), w(weight, u.weights(), threads);
  rounded(grad_x, u.inputs(), threads, [&](float* to) { upconv3d_grad_input(u, g.data(), w.data(), to, threads); });
}

template <typename S>
void upconv3d_grad_weight_half(const Upconv& u, const S* grad, const S* x, S* grad_weight, int threads) {
  const InFloat<S> g(grad, u.outputs(), threads), from(x, u.inputs(), threads);
  rounded(grad_weight, u.weights(), threads,
          [&](float* w) { upconv3d_grad_weight(u, g.data(), from.data(), w, threads); });
}
