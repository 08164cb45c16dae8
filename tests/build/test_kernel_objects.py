# SPDX-License-Identifier: Apache-2.0
"""Prebuilt kernels for the tests: they serve where there is no compiler, if nothing changed."""

import pytest

import kernel_objects
from jax_nvfp4.kernels import build


def test_a_prebuilt_folder_serves_while_its_sources_are_the_same(monkeypatch):
    kernel_objects.folder()
    kernel_objects._assert_up_to_date()
    monkeypatch.setattr(build, "_module_digest", lambda module: "another")
    with pytest.raises(AssertionError, match="have changed"):
        kernel_objects._assert_up_to_date()


def test_a_folder_without_kernels_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_objects, "FOLDER", tmp_path)
    with pytest.raises(AssertionError, match="has no kernels"):
        kernel_objects._assert_up_to_date()
