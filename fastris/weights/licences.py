"""Licences as the Hugging Face hub names them, and what others' weights and data mean for the choice."""

from __future__ import annotations

import difflib

COMMON = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail", "other")
"""What models are usually given."""

_NAMES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql
ofl-1.1 ncsa unlicense zlib pddl unknown other
"""

KNOWN = frozenset(_NAMES.split())
"""The identifiers of the hub's page "Licenses", but for those of single models; `other` serves for these."""

CHOICE = f"{', '.join(COMMON)} (with license_name= and license_link=)"


def check_licence(licence: str, name: str = "", link: str = "") -> None:
    """Raise ValueError for a licence that is not :data:`KNOWN`, or for an ``other`` one without name and link."""
    if licence not in KNOWN:
        close = difflib.get_close_matches(licence.lower(), sorted(KNOWN), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"license={licence} is none of the hub's that fastris knows; {hint}Common ones: {CHOICE}")
    if licence == "other" and not (name and link):
        raise ValueError("license=other needs license_name=my-licence and license_link=URL of its text")
    if licence != "other" and (name or link):
        raise ValueError(f"license_name and license_link go with license=other, and this is license={licence}")


def missing_licence() -> ValueError:
    """The error for a model that is to be published without one."""
    return ValueError(
        f"license is missing, and nobody but you can choose it: {CHOICE}; docs/sharing.md says what the licences of "
        "CLIP, Swin, BERT and of RefCOCO's pictures mean for it"
    )
