"""MLflow pyfunc of an encoder, by models from code.

The file is saved with the model and executed when it is loaded, so it uses absolute imports only.
"""

import mlflow

from ca2cl.registry.serving import TileEncoder


class Model(TileEncoder, mlflow.pyfunc.PythonModel):
    """MLflow wants annotations on a ``predict`` of the subclass itself; an inherited one it leaves alone."""


mlflow.models.set_model(Model())
