"""Graph networks in scikit-learn form whose node inputs are self-supervised embeddings and raw channels."""

from ssl_matfeat.negnn._classifier import NEGNNClassifier as NEGNNClassifier
from ssl_matfeat.negnn._regressor import NEGNNRegressor as NEGNNRegressor
