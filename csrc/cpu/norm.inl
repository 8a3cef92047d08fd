// Normalisation: reductions over the visible voxels of each sample, and elementwise passes. Features are stored as S and
// computed as T; tables are of T. Included once per instruction set, inside its namespace, after half.inl.

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

// V: T or a vector of it. slope 0 is ReLU: a zero for -inf too, and NaN stays NaN.
template <typename V, typename T>
inline V leaky(V value, T slope) {
  const V below = slope == 0 ? V{} : slope * value;
  return value < 0 ? below : value;
}
template <typename V, typename T>
inline V leaky_grad(V value, V grad, T slope) {
  const V below = slope == 0 ? V{} : slope * grad;
  return value > 0 ? grad : below;
}

inline bool visible(const Rows& rows, int64_t voxel) { return rows.voxels == nullptr || rows.voxels[voxel]; }

template <typename S, typename T = computed<S>>
void norm_statistics(const Rows& rows, const S* x, T* mean, T* squares, int64_t channels, int threads) {
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
        const S* in = x + v * channels;
        for_line<T>(channels, [&](auto c) { c.put(m, c.get(m) + c.get(in)); });
      }
      counts[i] = count;
      if (count == 0) continue;
      for (int64_t c = 0; c < channels; ++c) m[c] /= count;
      std::fill_n(r, channels, T(0));
      for (int64_t v = all[i].first; v < all[i].last; ++v) {
        if (!visible(rows, v)) continue;
        const S* in = x + v * channels;
        for_line<T>(channels, [&](auto c) {
          const auto deviation = c.get(in) - c.get(m);
          c.put(r, c.get(r) + deviation);
          c.put(s, c.get(s) + deviation * deviation);
        });
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

template <typename S, typename T = computed<S>>
void norm_apply(const Rows& rows, const S* x, const T* mean, const T* scale, const T* shift, const S* residual,
                T slope, S* y, int64_t channels, int threads) {
  const std::vector<Piece> all = pieces(rows, channels);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t i = 0; i < all.size(); ++i) {
    const T* m = mean + all[i].sample * channels;
    const T* a = scale + all[i].sample * channels;
    const T* b = shift + all[i].sample * channels;
    for (int64_t v = all[i].first; v < all[i].last; ++v) {
      const S* in = x + v * channels;
      S* out = y + v * channels;
      if (!visible(rows, v)) {
        std::fill_n(out, channels, S{});
      } else if (residual == nullptr) {
        for_line<T>(channels, [&](auto c) {
          c.put(out, leaky((c.get(in) - c.get(m)) * c.get(a) + c.get(b), slope));
        });
      } else {
        const S* add = residual + v * channels;
        for_line<T>(channels, [&](auto c) {
          c.put(out, leaky((c.get(in) - c.get(m)) * c.get(a) + c.get(b) + c.get(add), slope));
        });
      }
    }
  }
}

template <typename S, typename T = computed<S>>
void norm_grad_sums(const Rows& rows, const S* grad, const S* x, const S* y, const T* mean, const T* rstd,
                    const T* scale, const T* shift, T slope, S* before, T* of_grad, T* of_product, int64_t channels,
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
      const S *g = grad + v * channels, *in = x + v * channels;
      S* out = before == nullptr ? nullptr : before + v * channels;
      const auto add = [&](auto c, auto value, auto centred) {
        c.put(sum, c.get(sum) + value);
        c.put(product, c.get(product) + value * (centred * c.get(d)));
      };
      if (!visible(rows, v)) {
        if (before != nullptr) std::fill_n(out, channels, S{});
      } else if (before == nullptr) {
        for_line<T>(channels, [&](auto c) { add(c, c.get(g), c.get(in) - c.get(m)); });
      } else if (y != nullptr) {
        const S* sign = y + v * channels;
        for_line<T>(channels, [&](auto c) {
          const auto value = leaky_grad(c.get(sign), c.get(g), slope);
          c.put(out, value);
          add(c, value, c.get(in) - c.get(m));
        });
      } else {
        for_line<T>(channels, [&](auto c) {
          const auto centred = c.get(in) - c.get(m);
          const auto value = leaky_grad(centred * c.get(a) + c.get(b), c.get(g), slope);
          c.put(out, value);
          add(c, value, centred);
        });
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

template <typename S, typename T = computed<S>>
void norm_grad_input(const Rows& rows, const S* grad, const S* x, const T* mean, const T* rstd, const T* scale,
                     const T* offset, const T* tilt, S* grad_x, int64_t channels, int threads) {
  const std::vector<Piece> all = pieces(rows, channels);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t i = 0; i < all.size(); ++i) {
    const int64_t table = all[i].sample * channels;
    const T *m = mean + table, *d = rstd + table, *a = scale + table, *o = offset + table, *s = tilt + table;
    for (int64_t v = all[i].first; v < all[i].last; ++v) {
      const S *g = grad + v * channels, *in = x + v * channels;
      S* out = grad_x + v * channels;
      if (!visible(rows, v)) {
        std::fill_n(out, channels, S{});
        continue;
      }
      for_line<T>(channels, [&](auto c) {
        c.put(out, c.get(a) * c.get(g) - c.get(o) - c.get(s) * ((c.get(in) - c.get(m)) * c.get(d)));
      });
    }
  }
}

// Sums over the visible voxels of all samples: the gradient of a bias, which is stored as the features are.
template <typename S, typename T = computed<S>>
void channel_sums(const Rows& rows, const S* x, S* sums, int64_t channels, int threads) {
  const std::vector<Piece> all = pieces(rows, channels);
  const int64_t number = static_cast<int64_t>(all.size());
  std::vector<T> parts(number * channels);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < number; ++i) {
    T* sum = parts.data() + i * channels;
    for (int64_t v = all[i].first; v < all[i].last; ++v) {
      if (!visible(rows, v)) continue;
      const S* in = x + v * channels;
      for_line<T>(channels, [&](auto c) { c.put(sum, c.get(sum) + c.get(in)); });
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    double total = 0;
    for (int64_t i = 0; i < number; ++i) total += parts[i * channels + c];
    sums[c] = narrow<S>(static_cast<T>(total));
  }
}
