// Every sample's row, found and checked where its values can be read on the host.
#pragma once

#include <cmath>

#include "arguments.h"
#include "step_cpu.h"

namespace epskernels {

inline void check_row(const StepRow& row, int64_t index, int64_t columns = ROW_COLUMNS) {
  const float* values = reinterpret_cast<const float*>(&row);
  for (int column = 0; column < columns; ++column) {
    const bool is_clip = &values[column] == &row.clip;
    if (is_clip ? !valid_clip(row.clip) : !std::isfinite(values[column]))
      fail("rows: expected finite coefficients and clip >= 0, got ", values[column], " in row ", index, ", column ",
           column);
  }
  for (const auto& [name, count] : {std::pair("draw", row.draw), {"guided_channels", row.guided_channels}})
    if (!valid_count(count))
      fail("rows: expected ", name, " to be an integer in [0, 2^24), got ", count, " in row ", index);
}

inline const StepRow& row_at(const View& rows, int64_t index) {
  if (index < 0 || index >= rows.sizes[0]) fail("index: expected values in [0, ", rows.sizes[0], "), got ", index);
  return *reinterpret_cast<const StepRow*>(rows.data + index * rows.strides[0] * sizeof(float));
}

// A row's columns of the band; nullptr where rows have none.
inline const BandRow* band_of(const View& rows, const StepRow& row) {
  return rows.sizes[1] == WIDE_ROW_COLUMNS ? reinterpret_cast<const BandRow*>(&row + 1) : nullptr;
}

inline void check_band(const StepViews& a, const BandRow& band, int64_t index) {
  if (band.band_dims != 1.0f && band.band_dims != 2.0f)
    fail("rows: expected band_dims to be 1 or 2, got ", band.band_dims, " in row ", index);
  if (band.band_dims != static_cast<float>(a.band_dims()))
    fail("x: expected shape ", band.band_dims == 1.0f ? "(B, L) or (B, C, L)" : "(B, C, H, W) or (B, C, F, H, W)", ", as row ", index,
         " corrects a band of it, got ", a.x.shape());
}

inline void check_term(bool asked, bool present, int64_t index, const char* column, const char* argument) {
  if (asked && !present) fail(argument, ": missing, and row ", index, " needs it (", column, ")");
}

// Returns whether some sample makes its noise in the kernel.
inline bool read_rows(const StepViews& a, std::vector<Sample>& samples) {
  const bool one_row = a.index.dim == 0 && !a.seeds && !a.rescale && !a.threshold;
  samples.resize(one_row ? 1 : a.batch());
  bool draws = false;
  for (int64_t b = 0; b < static_cast<int64_t>(samples.size()); ++b) {
    const int64_t i = integer_at(a.index, b);
    const StepRow& row = row_at(a.rows, i);
    const bool checked = b > 0 && samples[b - 1].row == &row;
    unsigned terms = checked ? samples[b - 1].terms : row_terms(row);
    if (!checked) {
      check_row(row, i, a.rows.sizes[1]);
      check_term(terms & TERM_GUIDANCE, bool(a.u), i, "g is not 1", "u");
      check_term(terms & TERM_M1, bool(a.m1), i, "c_m1 is not 0", "m1");
      check_term(terms & TERM_M2, bool(a.m2), i, "c_m2 is not 0", "m2");
      check_term(terms & TERM_Y, bool(a.y), i, "c_y is not 0", "y");
      check_term(terms & TERM_K_M1, bool(a.m1), i, "k_m1 is not 0", "m1");
      check_term(terms & TERM_K_M2, bool(a.m2), i, "k_m2 is not 0", "m2");
      check_term(terms & TERM_K_Y, bool(a.y), i, "k_y is not 0", "y");
      check_term(terms & TERM_Y_OUT, a.has_y_out, i, "k_x, k_m0, k_m1, k_m2 or k_y is not 0", "y_out");
      check_term(terms & TERM_NOISE, a.seeds || a.noise, i, "c_noise is not 0", "seeds or noise");
      check_term(terms & TERM_VARIANCE, bool(a.v), i, "logvar_min and logvar_max are not 0", "v");
      if (!a.grad) terms &= ~TERM_GRAD;
      if (a.has_y_out) terms |= TERM_Y_OUT;
      if (a.rescale) terms |= TERM_RESCALE;
      if (a.threshold) terms |= TERM_THRESHOLD;
      if (!(terms & TERM_GUIDANCE)) terms &= ~TERM_CHANNELS;
      if (const BandRow* band = band_of(a.rows, row); band && corrects_band(*band)) {
        check_band(a, *band, i);
        terms |= TERM_BAND;
      }
    }
    Sample& sample = samples[b] = {&row, terms, a.seeds ? static_cast<uint64_t>(integer_at(a.seeds, b)) : 0};
    if (a.rescale) sample.rescale = float_at(a.rescale, b);
    if (a.threshold) {
      sample.threshold = float_at(a.threshold, b);
      if (!valid_threshold(sample.threshold))
        fail("threshold: expected finite values above 0, got ", sample.threshold, " for sample ", b);
    }
    draws |= (terms & TERM_NOISE) && !a.noise;
  }
  if (one_row) samples.resize(a.batch(), samples[0]);
  return draws;
}

}  // namespace epskernels
