"""Argosy behind Ray Serve: each replica runs `argosy serve` as its child, and passes requests on to it.

For those who have Ray Serve already. `argosy route` needs no Ray, takes no milliseconds for a request, and continues a
stream whose server dies, which Serve does not.

pip install 'ray[serve]>=2.55,<3' httpx
serve run examples.ray_serve:app
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import httpx
from ray import serve
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse

MODEL, MEMORY = "demo", "2GiB"
NOT_PASSED_ON = {"host", "content-length", "transfer-encoding", "connection", "origin", "accept-encoding"}


@serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 2})
class Argosy:
    """One server; Serve sends a request to the replica with fewer of them."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        port = self.url.rpartition(":")[2]
        command = [sys.executable, "-m", "argosy", "serve", MODEL, "--memory", MEMORY, "--port", port]
        self.server = subprocess.Popen(command)
        self.client = httpx.AsyncClient(base_url=self.url, timeout=None)
        while not self.is_ready():
            self.check_health()
            time.sleep(0.1)

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    def check_health(self) -> None:
        """Serve calls this, and replaces a replica that raises."""
        if self.server.poll() is not None:
            raise RuntimeError(f"argosy serve ended with {self.server.returncode}")

    async def __call__(self, request: Request) -> StreamingResponse:
        headers = {name: value for name, value in request.headers.items() if name not in NOT_PASSED_ON}
        asked = self.client.build_request(
            request.method,
            request.url.path,
            params=request.query_params,
            headers=headers,
            content=await request.body(),
        )
        answer = await self.client.send(asked, stream=True)
        kept = {name: value for name, value in answer.headers.items() if name not in NOT_PASSED_ON}
        closing = BackgroundTask(answer.aclose)
        return StreamingResponse(answer.aiter_raw(), answer.status_code, kept, background=closing)

    def __del__(self) -> None:
        self.server.terminate()


app = Argosy.bind()
