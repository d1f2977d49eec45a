"""What to say of a model that plays no legal action: there is nothing to measure."""

from __future__ import annotations

HOPELESS = 0.99  # share of illegal replies beyond which a model counts as playing no policy at all
_SHOWN = 100  # characters of a reply that are quoted


def hopeless(share: float, reply: str | None) -> str | None:
    """Why a model whose replies are illegal in `share` of the cases is not measured; None where it can be.

    `reply` is one of the illegal ones, as it was said.
    """
    if share <= HOPELESS:
        return None
    said = ""
    if reply is not None:
        shown = ascii(reply[:_SHOWN]) + (f" ... ({len(reply)} characters)" if len(reply) > _SHOWN else "")
        said = f"; one of them reads {shown if reply else 'nothing at all'}"
    return (
        f"{share:.1%} of the model's replies hold no legal action, so it has no policy to measure{said}. "
        "Check that the settings are those that the model was trained under (--recipe: model.template, "
        "text.think, text.rules), that a reply has room for its thought and \\boxed{action} "
        "(rollout.max_tokens), or warm the model up on the format first"
    )
