"""Errors as OpenAI's API words them."""

import logging
import secrets
from typing import Any

logger = logging.getLogger("hfkit.serve")

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """What a request is answered with instead.

    Args:
        status: of HTTP.
        message: what is wrong, and the rule.
        param: the name of the parameter.
        code: a word for programs.
        retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


class Failure(ApiError):
    """A fault of the server. It is logged under a reference, and the client is told that alone.

    Args:
        subject: what failed.

    Attributes:
        record: of it for the log of requests.
    """

    def __init__(self, subject: str, detail: str, code: str | None = None, cause: BaseException | None = None):
        reference = secrets.token_hex(8)
        super().__init__(500, f"the {subject} failed; tell the reference {reference}", code=code)
        self.record = f"{reference}: {detail}"
        logger.error("%s", self.record, exc_info=cause)
