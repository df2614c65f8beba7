"""The page: every scheme of the engine is one entry. What a part does stands in the part."""

from wmengine.marks.preset import Preset
from wmengine.parts.sources.activations import ActivationTerm, MeanActivations
from wmengine.parts.sources.integers import Elsewhere, IntegerWeights
from wmengine.parts.sources.latent import LatentActivations
from wmengine.parts.sources.weights import Weights
from wmengine.parts.statistics.either import Either
from wmengine.parts.symbols import Bits, Labels
from wmengine.parts.training.link import Link
from wmengine.parts.training.mixed import Mixed
from wmengine.parts.training.spread import Spread
from wmengine.parts.triggers.abstract import AbstractTriggers
from wmengine.parts.triggers.tokens import TokenTriggers

PRESETS = (
    Preset(
        name="sketch",
        version=1,
        source=Weights(carrier="unit_filters", projection="sketch"),
        symbols=Bits(256),
        statistic=Either(),
        training=Link(link="hinge", strength=0.001, margin=5.0),
        null="exact",
        paper="wmengine: one keyed sign per weight and T buckets, over the unit filters of all layers",
    ),
    Preset(
        name="uchida",
        version=1,
        source=Weights(carrier="filter_mean", projection="gaussian", marked="widest"),
        symbols=Bits(256),
        statistic=Either(),
        training=Link(link="bce", strength=0.01),
        null="exact",
        paper="Uchida, Nagai, Sakazawa, Satoh: Embedding watermarks into deep neural networks, ICMR 2017",
    ),
    Preset(
        name="adi",
        version=1,
        source=AbstractTriggers(),
        symbols=Labels(100),
        statistic=Either(),
        training=Mixed(),
        null="exact",
        paper="Adi, Baum, Cisse, Pinkas, Keshet: Turning your weakness into a strength, USENIX Security 2018",
    ),
    Preset(
        name="deepsigns",
        version=1,
        source=MeanActivations(groups=8, members=4),
        symbols=Bits(256),
        statistic=Either(),
        training=ActivationTerm(strength=0.01, pull=0.01),
        null="exact",
        paper="Rouhani, Chen, Koushanfar: DeepSigns, an end-to-end watermarking framework, ASPLOS 2019",
    ),
    Preset(
        name="adi_tokens",
        version=1,
        source=TokenTriggers(),
        symbols=Labels(100),
        statistic=Either(),
        training=Mixed(),
        null="exact",
        paper="Adi et al. 2018 (see adi), with sequences of tokens drawn from the key in place of pictures",
    ),
    Preset(
        name="diction",
        version=1,
        source=LatentActivations(groups=16, members=4, hidden=512),
        symbols=Bits(256),
        statistic=Either(),
        training=ActivationTerm(strength=0.01, pull=0.0),
        null="exact",
        paper="Bellafqira, Coatrieux: DICTION, dynamic robust white box watermarking, Applied Sciences 15(13), 2025",
    ),
    Preset(
        name="tattooed",
        version=1,
        source=Weights(carrier="flat", projection="rademacher"),
        symbols=Bits(256),
        statistic=Either(),
        training=Spread(margin=4.0),
        null="exact",
        paper="Pagnotta, Hitaj, Hitaj, Pérez-Cruz, Mancini: TATTOOED, spread-spectrum channel coding, ACSAC 2024",
    ),
    Preset(
        name="emmark",
        version=1,
        source=IntegerWeights(spare=8),
        symbols=Bits(256),
        statistic=Either(),
        training=Elsewhere(),
        null="exact",
        paper="Zhang, Koushanfar: EmMark, watermarks of embedded quantized large language models, DAC 2024",
    ),
)
