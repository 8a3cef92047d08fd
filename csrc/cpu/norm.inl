// Normalisation: reductions over the visible voxels of each sample, and elementwise passes. Included once per
// instruction set, inside its namespace.

// A piece is a range of voxels of one sample, small enough to stay in the L2 cache. Pieces depend on the problem alone,
// and their results are merged in order, so that sums do not depend on the threads.
struct Piece {
  int64_t sample, first, last;
};

inline std::vector<Piece> pieces(const Rows& rows, int64_t channels) {
  const int64_t size = std::clamp<int64_t>(16384 / std::max<int64_t>(channels, 1), 16, 4096);
  std::vector<Piece> result;
  for (int64_t n = 0; n < rows.samples; ++n) {
    const int64_t end = rows.offsets[n + 1] * rows.block;
    for (int64_t v = rows.offsets[n] * rows.block; v < end; v += size) result.push_back({n, v, std::min(end, v + size)});
  }
  return result;
}

// slope 0 is ReLU: a zero for -inf too, and NaN stays NaN.
template <typename T>
inline T leaky(T value, T slope) {
  const T below = slope == 0 ? T(0) : slope * value;
  return value < 0 ? below : value;
}
template <typename T>
inline T leaky_grad(T value, T grad, T slope) {
  const T below = slope == 0 ? T(0) : slope * grad;
  return value > 0 ? grad : below;
}

inline bool visible(const Rows& rows, int64_t voxel) { return rows.voxels == nullptr || rows.voxels[voxel]; }

template <typename T>
void norm_statistics(const Rows& rows, const T* x, T* mean, T* squares, int64_t channels, int threads) {
  const std::vector<Piece> all = pieces(rows, channels);
  const int64_t number = static_cast<int64_t>(all.size());
  std::vector<T> means(number * channels), spreads(number * channels);
  std::vector<int64_t> counts(number);
  std::vector<T> leftover(threads * channels);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < number; ++i) {
      T* r = leftover.data() + thread_number() * channels;
      T* m = means.data() + i * channels;
      T* s = spreads.data() + i * channels;
      int64_t count = 0;
      for (int64_t v = all[i].first; v < all[i].last; ++v) {
        if (!visible(rows, v)) continue;
        ++count;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) m[c] += x[v * channels + c];
      }
      counts[i] = count;
      if (count == 0) continue;
      for (int64_t c = 0; c < channels; ++c) m[c] /= count;
      std::fill_n(r, channels, T(0));
      for (int64_t v = all[i].first; v < all[i].last; ++v) {
        if (!visible(rows, v)) continue;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const T deviation = x[v * channels + c] - m[c];
          r[c] += deviation;
          s[c] += deviation * deviation;
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        // What rounding of the mean left over.
        s[c] -= r[c] * r[c] / count;
        m[c] += r[c] / count;
      }
    }
  }
  // Chan, Golub and LeVeque (1979).
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < channels; ++c) {
    int64_t i = 0;
    for (int64_t n = 0; n < rows.samples; ++n) {
      double total = 0, average = 0, spread = 0;
      for (; i < number && all[i].sample == n; ++i) {
        if (counts[i] == 0) continue;
        const double count = static_cast<double>(counts[i]), difference = means[i * channels + c] - average;
        spread += spreads[i * channels + c] + difference * difference * total * count / (total + count);
        average += difference * count / (total + count);
        total += count;
      }
      mean[n * channels + c] = static_cast<T>(average);
      squares[n * channels + c] = static_cast<T>(spread);
    }
  }
}

template <typename T>
void norm_apply(const Rows& rows, const T* x, const T* mean, const T* scale, const T* shift, const T* residual,
                T slope, T* y, int64_t channels, int threads) {
  const std::vector<Piece> all = pieces(rows, channels);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t i = 0; i < all.size(); ++i) {
    const T* m = mean + all[i].sample * channels;
    const T* a = scale + all[i].sample * channels;
    const T* b = shift + all[i].sample * channels;
    for (int64_t v = all[i].first; v < all[i].last; ++v) {
      const T* in = x + v * channels;
      T* out = y + v * channels;
      if (!visible(rows, v)) {
        std::fill_n(out, channels, T(0));
      } else if (residual == nullptr) {
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const T value = (in[c] - m[c]) * a[c] + b[c];
          out[c] = leaky(value, slope);
        }
      } else {
        const T* add = residual + v * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const T value = (in[c] - m[c]) * a[c] + b[c] + add[c];
          out[c] = leaky(value, slope);
        }
      }
    }
  }
}

template <typename T>
void norm_grad_sums(const Rows& rows, const T* grad, const T* x, const T* y, const T* mean, const T* rstd,
                    const T* scale, const T* shift, T slope, T* before, T* of_grad, T* of_product, int64_t channels,
                    int threads) {
  const std::vector<Piece> all = pieces(rows, channels);
  const int64_t number = static_cast<int64_t>(all.size());
  std::vector<T> sums(number * channels), products(number * channels);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < number; ++i) {
    const int64_t table = all[i].sample * channels;
    const T *m = mean + table, *d = rstd + table, *a = scale + table, *b = shift + table;
    T *sum = sums.data() + i * channels, *product = products.data() + i * channels;
    for (int64_t v = all[i].first; v < all[i].last; ++v) {
      const T* g = grad + v * channels;
      const T* in = x + v * channels;
      if (!visible(rows, v)) {
        if (before != nullptr) std::fill_n(before + v * channels, channels, T(0));
      } else if (before == nullptr) {
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          sum[c] += g[c];
          product[c] += g[c] * ((in[c] - m[c]) * d[c]);
        }
      } else if (y != nullptr) {
        const T* sign = y + v * channels;
        T* out = before + v * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const T value = leaky_grad(sign[c], g[c], slope);
          out[c] = value;
          sum[c] += value;
          product[c] += value * ((in[c] - m[c]) * d[c]);
        }
      } else {
        T* out = before + v * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const T centred = in[c] - m[c];
          const T value = leaky_grad(centred * a[c] + b[c], g[c], slope);
          out[c] = value;
          sum[c] += value;
          product[c] += value * (centred * d[c]);
        }
      }
    }
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < channels; ++c) {
    int64_t i = 0;
    for (int64_t n = 0; n < rows.samples; ++n) {
      double sum = 0, product = 0;
      for (; i < number && all[i].sample == n; ++i) {
        sum += sums[i * channels + c];
        product += products[i * channels + c];
      }
      of_grad[n * channels + c] = static_cast<T>(sum);
      of_product[n * channels + c] = static_cast<T>(product);
    }
  }
}

template <typename T>
void norm_grad_input(const Rows& rows, const T* grad, const T* x, const T* mean, const T* rstd, const T* scale,
                     const T* offset, const T* tilt, T* grad_x, int64_t channels, int threads) {
  const std::vector<Piece> all = pieces(rows, channels);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t i = 0; i < all.size(); ++i) {
    const int64_t table = all[i].sample * channels;
    const T *m = mean + table, *d = rstd + table, *a = scale + table, *o = offset + table, *s = tilt + table;
    for (int64_t v = all[i].first; v < all[i].last; ++v) {
      const T *g = grad + v * channels, *in = x + v * channels;
      T* out = grad_x + v * channels;
      if (!visible(rows, v)) {
        std::fill_n(out, channels, T(0));
        continue;
      }
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) out[c] = a[c] * g[c] - o[c] - s[c] * ((in[c] - m[c]) * d[c]);
    }
  }
}

// Sums over the visible voxels of all samples: the gradient of a bias.
template <typename T>
void channel_sums(const Rows& rows, const T* x, T* sums, int64_t channels, int threads) {
  const std::vector<Piece> all = pieces(rows, channels);
  const int64_t number = static_cast<int64_t>(all.size());
  std::vector<T> parts(number * channels);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < number; ++i) {
    T* sum = parts.data() + i * channels;
    for (int64_t v = all[i].first; v < all[i].last; ++v) {
      if (!visible(rows, v)) continue;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) sum[c] += x[v * channels + c];
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    double total = 0;
    for (int64_t i = 0; i < number; ++i) total += parts[i * channels + c];
    sums[c] = static_cast<T>(total);
  }
}
