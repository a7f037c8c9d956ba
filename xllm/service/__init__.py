"""HTTP service: from bytes on a socket to engine requests and back. In the order of a request: server, app, body,
params, template, tokenizer, dispatch, generation (text inside), openai, sse. No torch, no transformers."""
