"""How often a caller wants its request tried again: two headers of fal's.

fal has a budget for each of three conditions. Two of them are ours, the loss of a worker, whichever way it
shows; a request that ran for too long is never run again here.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError
from starlette.datastructures import Headers

from deployments.gateway.flags import flag
from schemas.errors import BadRequest

NONE = "x-fal-no-retry"
BUDGETS = "x-fal-retry-config"
MAX_RETRIES = 9  # fal tries ten times at most


class _Budget(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    retries: int = Field(ge=0, le=MAX_RETRIES)


class _Budgets(RootModel[dict[Literal["server_error", "timeout", "connection_error"], _Budget]]):
    pass


def most(headers: Headers) -> int | None:
    """How often a request may run again after the loss of its worker, None: as often as the server will.

    The server's own limits hold beside it. Raises BadRequest.
    """
    refuses, budgets = flag(headers, NONE, default=False), _budgets(headers.get(BUDGETS, "{}"))
    lost = [budget.retries for condition, budget in budgets.root.items() if condition != "timeout"]
    return 0 if refuses else min(lost, default=None)


def _budgets(text: str) -> _Budgets:
    try:
        return _Budgets.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([BUDGETS, *(str(each) for each in first["loc"] if each != "[key]")])
        raise BadRequest(f"{place}: {first['msg']}") from None
