"""What the API server of Kubernetes and the operator's resource definitions take."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

__all__ = ["custom_schemas", "problems"]

Document = dict[str, Any]


def closed(schema: Document) -> Document:
    """Turn a structural schema of Kubernetes into a JSON Schema that refuses unknown fields."""
    out: Document = {k: v for k, v in schema.items() if not k.startswith("x-kubernetes-") and k != "nullable"}
    out.pop("format", None)  # int32 and the like: not JSON Schema's
    if schema.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
    elif schema.get("nullable") and "type" in schema:
        out["type"] = [schema["type"], "null"]
    if "properties" in schema:
        out["properties"] = {name: closed(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    for inner in ("items", "additionalProperties"):
        if isinstance(out.get(inner), dict):
            out[inner] = closed(out[inner])
    return out


@cache
def custom_schemas() -> dict[tuple[str, str], Document]:
    """Return the operator's schemas by (apiVersion, kind); its files are read, it is not imported.

    They are a megabyte of YAML: parsed by libyaml, and not before a test needs them.
    """
    schemas = {}
    for file in importlib.metadata.files("dask-kubernetes") or ():
        if file.parent.name != "crds" or file.suffix != ".yaml":
            continue
        crd = yaml.load(Path(str(file.locate())).read_text(), yaml.CSafeLoader)
        for version in crd["spec"]["versions"]:
            schema = closed(version["schema"]["openAPIV3Schema"])
            # every object has these three, whatever its schema says
            schema["properties"] |= {
                "apiVersion": {"type": "string"},
                "kind": {"type": "string"},
                "metadata": {"type": "object"},
            }
            key = f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]
            schemas[key] = schema
    return schemas


def problems(document: Document) -> list[str]:
    """Say what the API server would refuse."""
    schema = custom_schemas().get((document["apiVersion"], document["kind"]))
    if schema is not None:
        errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
        return sorted(f"{error.json_path}: {error.message}" for error in errors)
    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{error.json_path}: {error.message}"]
    return []
