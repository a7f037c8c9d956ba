"""From a checkpoint folder to a program: `huggingface.capture`, the facts a server needs, and the tensors behind the
weights.

Read in this order: `facts.py` (what the folder says), `layers.py` (which layers to capture), `rotary.py` (positions
to tables), `huggingface.py` (capture), `exported.py` (torch.export to a program), `stamp.py` (back to full depth),
`weights.py`.
"""
