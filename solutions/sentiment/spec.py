"""Sentiment: which feeling a text carries. Also the recipe for any other text with one class per row."""

from ml.solution import SolutionSpec
from ml.text_classification.baseline import train_baseline
from ml.text_classification.cleaning import clean_texts
from ml.text_classification.codec import load_codec
from ml.text_classification.encoders import encoder_digest
from ml.text_classification.export import export_onnx
from ml.text_classification.metrics import classification_metrics
from ml.text_classification.model import build_module
from ml.text_classification.scoring import score_texts
from ml.text_classification.settings import TextClassifierConfig
from ml.text_classification.training import train_text_classifier

SPEC = SolutionSpec(
    name="sentiment",
    title="Sentiment of texts",
    model_config=TextClassifierConfig,
    clean=clean_texts,
    train=train_text_classifier,
    base_model_digest=lambda model: encoder_digest(model.encoder),
    export_onnx=export_onnx,
    build_module=build_module,
    load_codec=load_codec,
    score=score_texts,
    baseline=train_baseline,
    metrics=classification_metrics,
    sample_requests=(
        {"text": "A warm, funny film with a cast that clearly enjoys itself."},
        {"text": "Two hours of noise; I left with a headache and no idea what it was about."},
        {"text": "It starts slowly, but the last half hour is worth the price of the ticket."},
    ),
)
