"""What a served ONNX file takes in mlserver: a runtime of one's own, which therefore describes no inputs."""

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class OnnxRuntime(MLModel):
    async def load(self):
        self.session = onnxruntime.InferenceSession(self.settings.parameters.uri)
        return True

    async def predict(self, payload):
        given = {each.name: NumpyCodec.decode_input(each) for each in payload.inputs}
        wanted = [each.name for each in payload.outputs or self.session.get_outputs()]
        found = zip(wanted, self.session.run(wanted, given), strict=True)
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output(*each) for each in found])
