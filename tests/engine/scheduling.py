"""Schedulers and requests for the tests of the scheduler, with small pages and context."""

from slipway.engine.params import SamplingParams
from slipway.engine.request import Request, RequestSpec, Sequence
from slipway.engine.scheduler import Scheduler

PAGE_SIZE, NUM_PAGES, TABLE_WIDTH, STOP = 4, 16, 12, 7
LONGEST = PAGE_SIZE * TABLE_WIDTH


def make_scheduler(num_pages=64, **limits):
    return Scheduler(num_pages=num_pages, page_size=PAGE_SIZE, table_width=TABLE_WIDTH, **limits)


def make_request(number, prompt, max_tokens, n=1, **options):
    if isinstance(prompt, int):
        prompt = [100 * number + i for i in range(prompt)]
    scored = {"prompt_logprobs": 0} if options.pop("scored", False) else {}
    params = SamplingParams(n=n, max_tokens=max_tokens, **scored)
    request = Request(
        str(number), RequestSpec(prompt, params, **options), max_tokens, arrival=number
    )
    request.sequences = [Sequence(request, index, 0, frozenset({STOP}), None) for index in range(n)]
    return request
