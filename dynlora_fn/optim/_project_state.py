"""Apply a switch to the optimizer state."""

from typing import TypeVar, get_args

from dynlora_fn._core._check import check_choice, check_number
from dynlora_fn._core._check_plan import check_plans
from dynlora_fn._core._check_trees import check_trainable
from dynlora_fn._core._plans import remembered, share_plans
from dynlora_fn._core._types import Plans, Trainable
from dynlora_fn.optim._project_factors import Change, Context, Rule, check_change
from dynlora_fn.optim._roles import Roles, check_roles
from dynlora_fn.optim._search_state import project_state
from dynlora_fn.optim._state_rules import counterparts

State = TypeVar("State")

# What the rules need that do not apply to every field.
_NEEDED = {"prune": ("a moment", "use another rule"), "transport": ("a first moment", "use another rule")}


def project_optimizer_state(
    opt_state: State,
    plan: Plans,
    *,
    rule: Rule = "reset",
    prune: float = 0.99,
    change: Change | None = None,
    trainable: Trainable | None = None,
    roles: Roles | None = None,
) -> State:
    """Apply a rule to the optimizer state of the switched vectors' counterparts.

    Nothing else in the state changes. For each active entry of side a, the rule applies to the state of ``b[:, k]``.
    For side b it applies to the state of ``a[k]``. A switched vector keeps its slot's state, because its gradient
    depends on the counterpart and not on itself.

    ==============  ==================================================================================================
    rule            what happens to the counterparts
    ==============  ==================================================================================================
    "reset"         Moments and counts become zero. The counterparts are frozen for ``plan.frozen_for`` updates, during
                    which the count runs on (arXiv:2406.06564, section 3.3, as implemented).
    "reset_thawed"  As "reset", but the count starts at the thaw, so that the first update is a full one.
    "keep"          The state does not change.
    "prune"         The first moment loses a share of `prune` of its entries, the smallest in magnitude
                    (arXiv:2307.05695). Second moments lose such entries only where the first moment loses them. An
                    entry without its second moment would move by its first moment over `eps`.
    "transport"     The first moment becomes what it would have been with the new vectors, as far as it determines that.
                    With ``mu_b = G a.T / rank`` for an unknown G, ``mu_b (a a.T)^-1 a a_new.T`` is the moment of the G
                    of least norm. `mu_a` is treated in the same way. All other state is kept.
    ==============  ==================================================================================================

    Gradients belong to the factors of the forward pass. "reset" and "reset_thawed" with ``frozen_for`` of 1 or more let
    no counterpart move by a gradient from before the switch, so a step may switch first and then update. Otherwise a
    step must update first (see `Schedule.follows_update`).

    Args:
        opt_state: The state. It is searched through dicts, lists, tuples and dataclasses, which keep their types. What
            a field means is declared by its type (see `register_state`) or by `roles`, and never read from the
            name of a parameter or label. A field with a role contains dicts by parameter name. The state dict of a
            `torch.optim.Optimizer` and the states of torchopt are known. Their counts belong to whole tensors and do
            not change.
        plan: The plans by name.
        rule: One of the rules in the table.
        prune: The share in [0, 1] of the counterparts' entries, in one moment and side of a weight, that become zero.
        change: The parameters before and after the switch, for "transport" only.
        trainable: The trainable parameters. If they are passed, moments must have their shapes. They are required where
            tensors are numbered. For `torch.optim` they have the order of the optimizer, unless its tensors are named
            "w.b" and "w.a". For torchopt they are what the optimizer was initialized with.
        roles: The roles of the fields of your own states. A key of `roles` is the field or key directly above the dict
            by parameter name. It is needed only where no type declares a role. Default None means none.

    Returns:
        The new state, with the structure, shapes and dtypes of the old one.

    Raises:
        TypeError: If a part of a plan or of `trainable` has a wrong type or dtype.
        ValueError: If `plan` is not by name, `rule` or a role is unknown, or `prune` is not in [0, 1]. If `change` is
            missing for "transport" or passed with another rule. If a place in the state has factors, a matrix or an
            unknown object without a role, tensors in an attribute that is no field, or factors whose shapes do not fit
            their role. If the plan is on another device than the state, or the state has no factors
            of a planned parameter, for "prune" no moment, or for "transport" no first moment or one in 8 bit. For
            "prune" and "transport", if factors are sharded.

    Numerics: "transport" is computed in float32 or a wider dtype of the factors, and rounded to the moment's dtype. All
    other rules are exact.

    Example:
        >>> import torch
        >>> from dynlora_fn import Factors, Plan, SidePlan
        >>> trainable = {"w": Factors(b=torch.ones(3, 2), a=torch.ones(2, 3))}
        >>> opt_state = {"velocity": trainable, "step": 7}
        >>> side = SidePlan(slots=torch.tensor([1]), indices=torch.tensor([2]), active=torch.tensor([True]))
        >>> none = side._replace(active=torch.tensor([False]))
        >>> plan = {"w": Plan(b=none, a=side, frozen_for=torch.tensor(5))}  # a[1] is switched
        >>> new = project_optimizer_state(opt_state, plan, roles={"velocity": "first_moment"})
        >>> new["velocity"]["w"].b  # so the moment of b[:, 1] is reset
        tensor([[1., 0.],
                [1., 0.],
                [1., 0.]])
    """
    check_plans("plan", plan)
    check_choice("rule", rule, get_args(Rule))
    prune = check_number("prune", prune, least=0, most=1)
    if (rule == "transport") != (change is not None):
        raise ValueError(f"`change` must be passed only with rule 'transport', got rule {rule!r}")
    check_change(change)
    if trainable is not None:
        check_trainable("trainable", trainable)
    check_roles({} if roles is None else roles, "`roles`")
    find = remembered(counterparts) if share_plans(len(plan)) else counterparts
    context = Context(plan, rule, prune, change, trainable, roles or {}, set(), {}, {}, find)
    if rule == "prune":
        project_state(opt_state, context, ())  # collects the first moments, which decide what second moments lose
    projected: State = project_state(opt_state, context, ())
    if missing := sorted(set(plan) - context.projected):
        kind, hint = _NEEDED.get(rule, ("the factors", "initialize the optimizer with all trainable parameters"))
        raise ValueError(f"`opt_state` must have {kind} of every planned parameter, got none for {missing}; {hint}")
    return projected
