"""Make a pipeline sparse, generate, read the report, and take it off again."""

import adamac
from adamac import embedded

pipe = embedded.load()
prompt = embedded.prompts("plain")[0]["prompt"]

handle = adamac.enable(pipe, adamac.AdaCluster(), adamac.Schedule(first=1))
video = pipe(prompt, **(embedded.GENERATION | {"num_inference_steps": 3})).frames[0]
print(handle.report())
handle.disable()
