"""`project_optimizer_state`: apply a rule to the optimizer state after a switch."""

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

# What a state must contain for rules that do not apply to every field, and what to do if it does not.
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
    """Apply a rule to the optimizer state of the counterparts of switched vectors.

    Nothing else in the state changes. For each active entry of side a with slot k, the rule applies to the state of
    ``b[:, k]``. For side b it applies to the state of ``a[k]``. The state of a switched vector itself is kept, because
    its gradient depends on the counterpart and not on the vector.

    ==============  ==================================================================================================
    rule            what happens to the counterparts
    ==============  ==================================================================================================
    "reset"         Moments and counts become zero. The counterparts are frozen for ``plan.frozen_for`` updates, while
                    their counts increase (arXiv:2406.06564, section 3.3, as in its implementation).
    "reset_thawed"  As "reset", but the count starts at the thaw. So the first update has full size.
    "keep"          The state does not change.
    "prune"         In the first moment, the fraction `prune` of the entries becomes zero, the smallest in magnitude
                    (arXiv:2307.05695). In second moments, small entries become zero only if they do in the first
                    moment. Otherwise such an entry would move by its first moment over `eps`.
    "transport"     The first moment is estimated for the new vectors. ``mu_b = G a.T / rank`` for an unknown G, and the
                    new moment is ``mu_b (a a.T)^-1 a a_new.T``, the moment of the G of least norm. The same formula is
                    used for `mu_a`. All other state is kept.
    ==============  ==================================================================================================

    A gradient belongs to the factors of the forward pass. With "reset" or "reset_thawed", and ``frozen_for`` of at
    least 1, a counterpart does not move by a gradient from before the switch. So a step may switch first and then
    update. With other rules a step must update first (see `Schedule.follows_update`).

    Args:
        opt_state: The state. Dicts, lists, tuples and dataclasses in it are searched and keep their types. The meaning
            of a field is declared by its type (see `register_state`) or by `roles`. It is never read from the name of a
            parameter or label. A field with a role contains dicts by parameter name. The state dict of a
            `torch.optim.Optimizer` and the states of torchopt are supported. Their counts belong to whole tensors and
            do not change.
        plan: The plans by name.
        rule: One of the rules in the table.
        prune: The fraction in [0, 1] of the counterparts' entries that become zero, in each moment and side of a
            weight.
        change: The parameters before and after the switch, for "transport" only.
        trainable: The trainable parameters. If they are passed, moments must have their shapes. They are required for
            states that number their tensors. For `torch.optim`, pass them in the order of the optimizer, unless its
            tensors are named "w.b" and "w.a". For torchopt, pass what the optimizer was initialized with.
        roles: The roles of the fields of your own states. A key of `roles` is the field or key directly above the dict
            by parameter name. It is needed only for types that do not declare roles. Default None means no roles.

    Returns:
        The new state, with the structure, shapes and dtypes of the old state.

    Raises:
        TypeError: If a part of a plan, of `change` or of `trainable` has a wrong type or dtype.
        ValueError: If `plan` is not a dict by name, `rule` or a role is unknown, or `prune` is not in [0, 1]. If
            `change` is missing for "transport", of another rank, or passed with another rule. If the state has factors,
            a matrix or an unknown object without a role, tensors in an attribute that is no field, or factors whose
            shapes do not fit their role. If the plan is on another device. If the state has no factors of
            a planned parameter, no moment for "prune", or no first moment in full precision for "transport". For
            "prune" and "transport", if factors are sharded.

    Numerics: "transport" is computed in float32 or a wider dtype of the factors, and rounded to the moment's dtype. The
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
        problem = "missing" if change is None else "passed"
        raise ValueError(f"`change` is {problem} for rule {rule!r}; pass it for rule 'transport', and only for that")
    check_change(change)
    if trainable is not None:
        check_trainable("trainable", trainable)
    check_roles({} if roles is None else roles, "`roles`")
    find = remembered(counterparts) if share_plans(len(plan)) else counterparts
    context = Context(plan, rule, prune, change, trainable, roles or {}, set(), {}, {}, find)
    if rule == "prune":
        project_state(opt_state, context, ())  # collects first moments, which determine the pruning of second moments
    projected: State = project_state(opt_state, context, ())
    if missing := sorted(set(plan) - context.projected):
        kind, hint = _NEEDED.get(rule, ("the factors", "initialize the optimizer with all trainable parameters"))
        raise ValueError(f"`opt_state` must have {kind} of every planned parameter, got none for {missing}; {hint}")
    return projected
