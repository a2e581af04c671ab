"""Profiles that come with the project, measured on models that it can fetch."""

from importlib import resources

from fairkv_jax.plan.profile import Profile


def shipped_profile(model: str, policy: str) -> Profile | None:
    """The measured profile of a model under a policy, or None where nobody has measured one."""
    file = resources.files("fairkv_jax.plan") / "profiles" / f"{model}.{policy}.json"
    return Profile.from_json(file.read_text(encoding="utf-8")) if file.is_file() else None
