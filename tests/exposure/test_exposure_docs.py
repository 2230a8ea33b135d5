"""The example of docs/exposure.md runs as it stands."""

import numpy as np
import pytest

from epskernels import exposure, scaling

from ..support import markdown_examples

pytestmark = pytest.mark.usefixtures("one_thread")


def test_exposure_page(tmp_path):
    names = markdown_examples.run("docs/exposure.md", tmp_path)
    np.testing.assert_array_equal(exposure.Exposure.load(tmp_path / "exposure.json").norm_gap, names["found"].norm_gap)
    assert scaling.load(tmp_path / "lambda.json")[0].values(3).tolist() == names["matched"].lambda_t.tolist()
    assert (tmp_path / "exposure.png").stat().st_size > 1000 and (tmp_path / "trials.json").exists()
