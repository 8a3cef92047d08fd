// Pooling over windows. Masked voxels count as zeros; outside the volume the average sees zeros and the maximum
// nothing. Features are stored as S and computed as T, a line of channels at a time. Included once per instruction set,
// inside its namespace, after half.inl.

// The geometry of one window: calls use(tap, gathered voxel or -1) for each tap, in order.
template <typename Use>
inline void for_each_tap(const Window& w, const Locator& locator, int64_t row, int64_t z, int64_t y, int64_t x,
                         const Use& use) {
  const int64_t span_h = 2 * w.radius.h + 1, span_w = 2 * w.radius.w + 1;
  const int32_t* table = w.table + row * w.columns();
  int64_t tap = 0;
  for (int64_t tz = 0; tz < w.kernel.d; ++tz) {
    const Source at_z = locator.at(0, tz, z);
    for (int64_t ty = 0; ty < w.kernel.h; ++ty) {
      const Source at_y = locator.at(1, ty, y);
      for (int64_t tx = 0; tx < w.kernel.w; ++tx, ++tap) {
        const Source at_x = locator.at(2, tx, x);
        int64_t voxel = -1;
        if (at_z.block >= 0 && at_y.block >= 0 && at_x.block >= 0) {
          const int64_t block = table[(at_z.block * span_h + at_y.block) * span_w + at_x.block];
          if (block >= 0) {
            voxel = ((block * w.gathered_block.d + at_z.local) * w.gathered_block.h + at_y.local) * w.gathered_block.w +
                    at_x.local;
            if (w.gathered_voxels != nullptr && !w.gathered_voxels[voxel]) voxel = -1;
          }
        }
        use(tap, voxel);
      }
    }
  }
}

// Whether input positions lie in the volume, for the output voxel (z, y, x) of a block and all taps of an axis.
struct Inside {
  Inside(const Window& w, const Place& place, int64_t row, int64_t z, int64_t y, int64_t x) {
    const int64_t local[3] = {z, y, x};
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t o = place.target_index[row * 4 + axis + 1] * w.written_block[axis] + local[axis];
      const int64_t start = o * w.stride[axis] - w.padding[axis];
      first[axis] = std::max<int64_t>(0, -start);
      last[axis] = std::min(w.kernel[axis], place.shape[axis] - start);
    }
  }
  int64_t count() const {
    int64_t product = 1;
    for (int axis = 0; axis < 3; ++axis) product *= std::max<int64_t>(0, last[axis] - first[axis]);
    return product;
  }
  bool has(const Window& w, int64_t tap) const {
    const int64_t t[3] = {tap / w.kernel.w / w.kernel.h, tap / w.kernel.w % w.kernel.h, tap % w.kernel.w};
    for (int axis = 0; axis < 3; ++axis) {
      if (t[axis] < first[axis] || t[axis] >= last[axis]) return false;
    }
    return true;
  }
  int64_t first[3], last[3];
};

// each(row, z, y, x, voxel): of every written voxel.
template <typename Each>
inline void for_each_voxel(const Window& w, int threads, const Each& each) {
  const Triple block = w.written_block;
  const int64_t planes = w.written_rows * block.d;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
  for (int64_t plane = 0; plane < planes; ++plane) {
    const int64_t row = plane / block.d, z = plane % block.d;
    for (int64_t y = 0; y < block.h; ++y) {
      for (int64_t x = 0; x < block.w; ++x) each(row, z, y, x, (plane * block.h + y) * block.w + x);
    }
  }
}

// Writes out[voxel, channels]: zeros where masked, else what compute(row, z, y, x, voxel, line, room) leaves in `line`.
// `room` is for a second line.
template <typename S, typename Compute>
inline void write_lines(const Window& w, S* out, int64_t channels, int threads, const Compute& compute) {
  using T = computed<S>;
  const BufferPerThread<T> lines(threads, 2 * channels);
  for_each_voxel(w, threads, [&](int64_t row, int64_t z, int64_t y, int64_t x, int64_t voxel) {
    S* to = out + voxel * channels;
    if (w.written_voxels != nullptr && !w.written_voxels[voxel]) {
      std::fill_n(to, channels, S{});
      return;
    }
    T* line = lines.mine();
    compute(row, z, y, x, voxel, line, line + channels);
    for_line<T>(channels, [&](auto c) { c.put(to, c.get(line)); });
  });
}

// What a sum is multiplied by to become an average.
template <typename T>
inline T share(const Window& w, const Place& place, int64_t divisor, int64_t row, int64_t z, int64_t y, int64_t x) {
  const int64_t count = divisor > 0 ? divisor : std::max<int64_t>(1, Inside(w, place, row, z, y, x).count());
  return T(1) / static_cast<T>(count);
}

template <typename S, typename T = computed<S>>
void average(const Window& w, const Place& place, const S* in, S* out, int64_t channels, int64_t divisor, int threads) {
  const Locator locator(w);
  write_lines(w, out, channels, threads, [&](int64_t row, int64_t z, int64_t y, int64_t x, int64_t, T* sums, T*) {
    std::fill_n(sums, channels, T(0));
    for_each_tap(w, locator, row, z, y, x, [&](int64_t, int64_t other) {
      if (other < 0) return;
      const S* from = in + other * channels;
      for_line<T>(channels, [&](auto c) { c.put(sums, c.get(sums) + c.get(from)); });
    });
    const T factor = share<T>(w, place, divisor, row, z, y, x);
    for (int64_t c = 0; c < channels; ++c) sums[c] *= factor;
  });
}

template <typename S, typename T = computed<S>>
void average_grad(const Window& forward, const Window& transposed, const Place& place, const S* grad, S* grad_in,
                  int64_t channels, int64_t divisor, int threads) {
  // [outputs]: what each average was multiplied by.
  std::vector<T> factors(forward.written_rows * forward.written_block.volume());
  for_each_voxel(forward, threads, [&](int64_t row, int64_t z, int64_t y, int64_t x, int64_t voxel) {
    factors[voxel] = share<T>(forward, place, divisor, row, z, y, x);
  });
  const Locator locator(transposed);
  write_lines(transposed, grad_in, channels, threads,
              [&](int64_t row, int64_t z, int64_t y, int64_t x, int64_t, T* sums, T*) {
    std::fill_n(sums, channels, T(0));
    for_each_tap(transposed, locator, row, z, y, x, [&](int64_t, int64_t other) {
      if (other < 0) return;
      const S* from = grad + other * channels;
      const T factor = factors[other];
      for_line<T>(channels, [&](auto c) { c.put(sums, c.get(sums) + c.get(from) * factor); });
    });
  });
}

template <typename S, typename T = computed<S>>
void maximum(const Window& w, const Place& place, const S* in, S* out, int32_t* winners, int64_t channels,
             int threads) {
  const Locator locator(w);
  if (winners != nullptr) std::fill_n(winners, w.written_rows * w.written_block.volume() * channels, -1);
  write_lines(w, out, channels, threads,
              [&](int64_t row, int64_t z, int64_t y, int64_t x, int64_t voxel, T* most, T* room) {
    int32_t* winner = winners == nullptr ? nullptr : winners + voxel * channels;
    std::fill_n(most, channels, -std::numeric_limits<T>::infinity());
    const Inside inside(w, place, row, z, y, x);
    bool first = true;
    for_each_tap(w, locator, row, z, y, x, [&](int64_t tap, int64_t other) {
      if (!inside.has(w, tap)) return;
      const T* from = other < 0 ? nullptr : widened(in + other * channels, channels, room);
      for (int64_t c = 0; c < channels; ++c) {
        const T value = from == nullptr ? T(0) : from[c];
        if (first || value > most[c] || value != value) {
          most[c] = value;
          if (winner != nullptr) winner[c] = other < 0 ? -1 : static_cast<int32_t>(tap);
        }
      }
      first = false;
    });
  });
}

template <typename S, typename T = computed<S>>
void maximum_grad(const Window& transposed, const int32_t* winners, const S* grad, S* grad_in, int64_t channels,
                  int threads) {
  const Locator locator(transposed);
  write_lines(transposed, grad_in, channels, threads,
              [&](int64_t row, int64_t z, int64_t y, int64_t x, int64_t, T* sums, T* room) {
    std::fill_n(sums, channels, T(0));
    for_each_tap(transposed, locator, row, z, y, x, [&](int64_t tap, int64_t other) {
      if (other < 0) return;
      const T* from = widened(grad + other * channels, channels, room);
      for (int64_t c = 0; c < channels; ++c) {
        if (winners[other * channels + c] == tap) sums[c] += from[c];
      }
    });
  });
}
