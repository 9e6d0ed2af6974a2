"""The OpenAI-compatible endpoint: served names in front, one deployment for each pair or model behind."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.llm.ingress import OpenAiIngress
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from expo_ray.extrapolation.step import Step
from expo_ray.on_ray.serving.engine_adapter import ModelCard, ModelList, OpenAIHTTPException
from expo_ray.serving.request_checks import HEALTH, RETRY_AFTER_S, RequestChecks
from expo_ray.serving.served_models import NameFault, ServedName, parse_name
from expo_ray.text import first_few

ENDPOINTS: Mapping[str, Any] = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "completions": lambda app: app.post("/v1/completions"),
    "chat": lambda app: app.post("/v1/chat/completions"),
    "tokenize": lambda app: app.post("/tokenize"),
    "detokenize": lambda app: app.post("/detokenize"),
}


class Ingress(OpenAiIngress):
    """Finds the engines of a served name.

    Args:
        engines: names of the deployment and its application, by the name of the pair or model.
        pairs: the alphas to list of each pair, by name; other models take no alpha.
        failures: why other models have no engines, by name.
    """

    def __init__(
        self,
        engines: Mapping[str, tuple[str, str]],
        pairs: Mapping[str, Sequence[float]],
        failures: Mapping[str, str],
    ) -> None:
        # The engines of a search start after this: a handle looks for them at its first request.
        self._engines = {
            name: serve.get_deployment_handle(*address, _check_exists=False)
            for name, address in engines.items()
        }
        super().__init__(dict(self._engines), {name: _card(name) for name in engines})
        self._streams = {name: handle.options(stream=True) for name, handle in self._engines.items()}
        self._pairs, self._failures = pairs, failures

    async def _get_model_id(self, model: str | None) -> str:
        return str(self._find(model))

    def _get_configured_serve_handle(self, model_id: str) -> DeploymentHandle[Any]:
        return self._streams[parse_name(model_id).base]

    async def models(self) -> ModelList:
        listed = [ServedName(name, None) for name in self._engines]
        listed += [ServedName(name, Step(alpha)) for name, alphas in self._pairs.items() for alpha in alphas]
        return ModelList(data=[_card(str(name)) for name in listed])

    async def model_data(self, model: str) -> ModelCard:
        name = self._find(model)
        return _card(model, await self._engines[name.base].card.remote(str(name)))

    def _find(self, model: str | None) -> ServedName:
        """Parse the name of a request and check that it is served; the result spells it in one way.

        Raises:
            OpenAIHTTPException: 400 for a bad alpha or none, 404 for an unknown name.
        """
        if not model:
            raise _refusal(400, f"the request names no model; served are {self._served()}", "model_missing")
        try:
            name = parse_name(model)
        except NameFault as error:
            raise _refusal(400, str(error), "bad_alpha") from error
        if name.base in self._failures:
            raise _refusal(404, f"{name.base} is not served: {self._failures[name.base]}", "model_not_found")
        if name.base not in self._engines:
            raise _refusal(
                404, f"model {model!r} is not served here; served are {self._served()}", "model_not_found"
            )
        if name.step is not None and name.base not in self._pairs:
            raise _refusal(
                404,
                f"{name.base} is a published model and has no other alpha; ask for `{name.base}`",
                "model_not_found",
            )
        return name

    def _served(self) -> str:
        return first_few(
            [f"`{name}@ALPHA`" if name in self._pairs else f"`{name}`" for name in self._engines]
        )


def _card(name: str, metadata: Mapping[str, Any] | None = None) -> ModelCard:
    return ModelCard(
        id=name, object="model", owned_by="expo-ray", permission=[], metadata=dict(metadata or {})
    )


def _refusal(status: int, message: str, kind: str) -> OpenAIHTTPException:
    return OpenAIHTTPException(status, message, kind)


def web_app(hosts: Collection[str] = (), key_digest: str = "") -> FastAPI:
    """Make the HTTP application, whose errors have the form that OpenAI's clients expect.

    Ray's own application is not used: it lets every web page that is open in a browser ask the endpoint (CORS), and wraps the
    messages of errors twice.

    Args:
        hosts, key_digest: see `RequestChecks`.
    """
    # The pages of /docs would load scripts from another site.
    app = FastAPI(title="expo-ray", docs_url=None, redoc_url=None)
    app.add_middleware(RequestChecks, hosts=frozenset(hosts), key_digest=key_digest)

    @app.get(HEALTH)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.exception_handler(OpenAIHTTPException)
    async def refused(request: Request, error: OpenAIHTTPException) -> JSONResponse:
        return _error(error.status_code, error.message, error.type)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), "invalid_request_error")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        return _error(400, first_few(problems), "invalid_request_error")

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return _error(500, str(error).strip().rpartition("\n")[2], "server_error")

    return app


def _error(status: int, message: str, kind: str) -> JSONResponse:
    body = {"message": message, "type": kind, "param": None, "code": status}
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in {429, 503} else None
    return JSONResponse({"error": body}, status_code=status, headers=headers)
