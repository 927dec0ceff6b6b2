"""A new fact of a request is a field of RequestSpec and its reader in the batch, and nothing else.

The rest of the way is the server's own: body, message to the engine's process, engine, scheduler.
"""

import json
import subprocess
import sys

SCRIPT = """
import dataclasses, json, sys
import slipway.engine.request as request

@dataclasses.dataclass(frozen=True)
class Spec(request.RequestSpec):
    tone: int = dataclasses.field(default=0, metadata=request.FROM_BODY, kw_only=True)

request.RequestSpec = Spec  # as if the field stood there: every module below imports it from here
import slipway.engine.batch as batch

seen = []
build = batch.Builder.build

def reading_build(self, chunks, bucket):
    seen.extend(chunk.sequence.request.spec.tone for chunk in chunks)
    return build(self, chunks, bucket)

batch.Builder.build = reading_build

import msgspec
from slipway.engine.params import SamplingParams
from slipway.llm import LLM
from slipway.server import messages, schema

found = {}
for kind, body in (("Completion", {"prompt": "a"}), ("Chat", {"messages": []})):
    text = json.dumps(body | {"tone": 7, "priority": 3, "cache_salt": "s"}).encode()
    decoded = msgspec.json.decode(text, type=getattr(schema, kind))
    spec = request.RequestSpec([5, 6, 7], SamplingParams(max_tokens=2), **schema.facts(decoded))
    sent = msgspec.msgpack.encode([messages.Add(1, spec)])
    (received,) = msgspec.msgpack.decode(sent, type=list[messages.ToEngine])
    found[kind] = [received.spec.tone, received.spec.priority, received.spec.cache_salt]
with LLM(sys.argv[1], skip_tokenizer_init=True) as llm:
    llm.engine.add(received.spec)
    while llm.engine.has_work():
        llm.engine.step()
print(json.dumps({"received": found, "in the batch": sorted(set(seen))}))
"""


def test_a_new_fact_passes_from_the_body_to_the_batch(tiny):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["received"] == {"Completion": [7, 3, "s"], "Chat": [7, 3, "s"]}
    assert found["in the batch"] == [7]
