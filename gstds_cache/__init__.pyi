from .api.train import estimate_training as estimate_training
from .api.train import train as train
from .config import EmbedConfig as EmbedConfig
from .config import SelectConfig as SelectConfig
from .config import TrainConfig as TrainConfig
from .data.sources import open_source as open_source
from .embedding.run import EmbedReport as EmbedReport
from .errors import GstdsError as GstdsError
from .errors import UsageError as UsageError
from .graph.knn import knn_graph as knn_graph
from .selection.rule import Rule as Rule
from .selection.rule import RuleBatch as RuleBatch
from .spectral.fiedler import fiedler_vectors as fiedler_vectors
from .spectral.status import Status as Status
from .store.reader import EmbeddingStore as EmbeddingStore
from .stream.reader import SelectionStream as SelectionStream
from .stream.reader import open_selection as open_selection
from .training.ledger import Ledger as Ledger
from .training.report import TrainReport as TrainReport
from .training.sampler import SelectedBatchSampler as SelectedBatchSampler
from .training.selected_dataset import SelectedDataset as SelectedDataset

__version__: str
