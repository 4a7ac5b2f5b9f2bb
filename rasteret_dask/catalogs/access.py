# SPDX-License-Identifier: Apache-2.0
"""How a request is let in: signed, paid for by the requester, or anonymous; told by the host.

Stored hrefs hold no credentials. Those are resolved at read time, in the process that reads: the catalog's ``store``
tables say which host wants what, keys come from the environment, signatures from :mod:`rasteret_dask.catalogs.signing`.
"""

from __future__ import annotations

import os

from rasteret_dask.catalogs.signing import ANEW, expired, host_of, rule_of, signs_for

__all__ = ["environment", "has_keys", "remedy", "rule_of"]

_KEYS = {
    "s3": (
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_SKIP_SIGNATURE",  # "false" makes obstore ask the instance's metadata service
    ),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_KEY"),
}


def environment() -> tuple[tuple[str, str], ...]:
    """Return the environment's variables that stores look at, sorted."""
    return tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", "AZURE_", "GOOGLE_"))))


def has_keys(scheme: str, names: dict[str, str]) -> bool:
    """Return whether an environment holds keys for a kind of store; without any, requests are not signed."""
    return any(key in names for key in _KEYS.get(scheme, ()))


def remedy(href: str) -> str:
    """Return what may help where a store has refused an href; "" where nothing is known of it."""
    ended = expired(href)
    if ended is not None:
        return f"Its signature expired at {ended:%Y-%m-%d %H:%M:%S} UTC. {ANEW}"
    rule = rule_of(href)
    if rule is None or rule.access == "anonymous":
        host = host_of(href)
        return (
            f"If it needs a signature: rd.sign('https://{host}', 'module:name')."
            if host and not signs_for(host)
            else ""
        )
    if rule.access == "keys":
        return (
            "This bucket is read with the keys of an account: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY here and "
            "on every worker."
        )
    if rule.access == "requester-pays":
        where = f" (transfer within {rule.region} is free)" if rule.region else ""
        return (
            f"This bucket's reader pays{where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of your account here "
            "and on every worker."
        )
    return "Planetary Computer's token was refused: check this machine's clock."
