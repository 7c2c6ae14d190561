"""Writes k8s/: a Kustomize base and its overlays, from the objects that `distrl k8s render` prints.

python -m deploy.k8s.folder
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.k8s.objects import Json, run_objects, to_yaml
from deploy.k8s.values import OVERLAYS, make_values
from distrl.config import load_config

FOLDER = Path(__file__).parents[2] / "k8s"
_HEAD = "# Written by `python -m deploy.k8s.folder`, as `distrl k8s render` prints it; change deploy/k8s/ instead.\n"
IMAGES = {"cpu": ["image=distrl:0.1.0-cpu"], "gpu": ["image=distrl:0.1.0-cpu", "gpu_image=distrl:0.1.0-gpu"]}
ELASTIC = {"cpu": [], "gpu": ["generation.max_replicas=16"]}


def overlay_objects(overlay: str) -> list[Json]:
    """What an overlay of the folder builds to: its own config.yaml, rendered."""
    config = load_config(FOLDER / "overlays" / overlay / "config.yaml")
    return run_objects(config, make_values(overlay, [*IMAGES[overlay], *ELASTIC[overlay]], config))


def files() -> dict[Path, str]:
    """Every file of the folder but the configs, which are written by hand."""
    base = overlay_objects("cpu")
    made = {
        Path("base/objects.yaml"): _HEAD + to_yaml(base),
        Path("base/kustomization.yaml"): _kustomization(resources=["objects.yaml"]),
    }
    for overlay in OVERLAYS:
        patches, added = _difference(base, overlay_objects(overlay))
        folder = Path("overlays", overlay)
        resources = ["../../base"]
        if added:
            made[folder / "objects.yaml"] = _HEAD + to_yaml(added)
            resources.append("objects.yaml")
        names = []
        for patch in patches:
            name = f"{patch['kind'].lower()}-{patch['metadata']['name']}.yaml"
            made[folder / name] = _HEAD + to_yaml([patch])
            names.append({"path": name})
        made[folder / "kustomization.yaml"] = _kustomization(resources=resources, patches=names)
    return made


def write() -> None:
    for path, text in files().items():
        target = FOLDER / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def _kustomization(**parts: Any) -> str:
    head = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    return _HEAD + to_yaml([{**head, **{name: part for name, part in parts.items() if part}}])


def _key(thing: Json) -> tuple[str, str]:
    return thing["kind"], thing["metadata"]["name"]


def _difference(base: list[Json], wanted: list[Json]) -> tuple[list[Json], list[Json]]:
    """(patches of the base's objects, objects that the base lacks)."""
    there = {_key(thing): thing for thing in base}
    patches = []
    for thing in wanted:
        before = there.get(_key(thing))
        if before is not None and (patch := _merge_patch(before, thing)):
            names = {"name": thing["metadata"]["name"]}
            if "namespace" in thing["metadata"]:
                names["namespace"] = thing["metadata"]["namespace"]
            head = {"apiVersion": thing["apiVersion"], "kind": thing["kind"], "metadata": names}
            patches.append({**head, **patch})
    return patches, [thing for thing in wanted if _key(thing) not in there]


def _merge_patch(before: Mapping[str, Any], after: Mapping[str, Any]) -> Json:
    """RFC 7396: what to lay over `before` to get `after`; lists are replaced whole."""
    patch: Json = {name: None for name in before if name not in after}
    for name, value in after.items():
        if isinstance(value, Mapping) and isinstance(before.get(name), Mapping):
            if inner := _merge_patch(before[name], value):
                patch[name] = inner
        elif before.get(name) != value:
            patch[name] = value
    return patch


if __name__ == "__main__":
    write()
