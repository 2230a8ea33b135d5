// Every sample's row, found and checked where its values can be read on the host.
#pragma once

#include <cmath>

#include "arguments.h"
#include "step_cpu.h"

namespace epskernels {

inline void check_row(const StepRow& row, int64_t index) {
  const float* values = reinterpret_cast<const float*>(&row);
  for (int column = 0; column < ROW_COLUMNS; ++column) {
    const bool is_clip = &values[column] == &row.clip;
    if (is_clip ? !valid_clip(row.clip) : !std::isfinite(values[column]))
      fail("rows: expected finite coefficients and clip >= 0, got ", values[column], " in row ", index, ", column ",
           column);
  }
  if (!valid_draw(row.draw))
    fail("rows: expected draw to be an integer in [0, 2^24), got ", row.draw, " in row ", index);
}

inline void check_term(bool asked, bool present, int64_t index, const char* column, const char* argument) {
  if (asked && !present) fail(argument, ": missing, and row ", index, " needs it (", column, ")");
}

// Returns whether some sample makes its noise in the kernel.
inline bool read_rows(const StepViews& a, std::vector<Sample>& samples) {
  const bool one_row = a.index.dim == 0 && !a.seeds;
  samples.resize(one_row ? 1 : a.batch());
  bool draws = false;
  for (int64_t b = 0; b < static_cast<int64_t>(samples.size()); ++b) {
    const int64_t i = integer_at(a.index, b);
    if (i < 0 || i >= a.rows.sizes[0]) fail("index: expected values in [0, ", a.rows.sizes[0], "), got ", i);
    const StepRow& row = *reinterpret_cast<const StepRow*>(a.rows.data + i * a.rows.strides[0] * sizeof(float));
    const bool checked = b > 0 && samples[b - 1].row == &row;
    unsigned terms = checked ? samples[b - 1].terms : row_terms(row);
    if (!checked) {
      check_row(row, i);
      check_term(terms & TERM_GUIDANCE, bool(a.u), i, "g is not 1", "u");
      check_term(terms & TERM_M1, bool(a.m1), i, "c_m1 is not 0", "m1");
      check_term(terms & TERM_M2, bool(a.m2), i, "c_m2 is not 0", "m2");
      check_term(terms & TERM_NOISE, a.seeds || a.noise, i, "c_noise is not 0", "seeds or noise");
      check_term(terms & TERM_VARIANCE, bool(a.v), i, "logvar_min and logvar_max are not 0", "v");
      if (!a.grad) terms &= ~TERM_GRAD;
    }
    samples[b] = {&row, terms, a.seeds ? static_cast<uint64_t>(integer_at(a.seeds, b)) : 0};
    draws |= (terms & TERM_NOISE) && !a.noise;
  }
  if (one_row) samples.resize(a.batch(), samples[0]);
  return draws;
}

}  // namespace epskernels
