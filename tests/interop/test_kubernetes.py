"""The manifests against the schemas of Kubernetes, by the package kubernetes-validate."""

from typing import Any

import pytest

from tests.docs.test_deployment import MANIFESTS

pytestmark = pytest.mark.interop


def test_the_manifests_match_the_schemas_of_kubernetes() -> None:
    validate: Any = pytest.importorskip("kubernetes_validate")
    for manifest in MANIFESTS.values():
        validate.validate(manifest, validate.latest_version(), strict=True)
