"""The page: every scheme of the engine is one entry. What a part does stands in the part."""

from wmengine.marks.preset import Preset
from wmengine.parts.sources.activations import ActivationTerm, MeanActivations
from wmengine.parts.sources.extracted import Extracted
from wmengine.parts.sources.integers import Elsewhere, IntegerWeights
from wmengine.parts.sources.latent import LatentActivations
from wmengine.parts.sources.passports import Passports
from wmengine.parts.sources.weights import PeriodicWeights, Weights
from wmengine.parts.statistics.either import Either
from wmengine.parts.symbols import Bits, ChannelBits, Labels
from wmengine.parts.training.covert import Covert
from wmengine.parts.training.link import Link
from wmengine.parts.training.mixed import Mixed
from wmengine.parts.training.passports import PassportSigns
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
        name="deepipr_v1",
        version=1,
        source=Passports(),
        symbols=ChannelBits(256),
        statistic=Either(),
        training=PassportSigns(branch="deployed"),
        null="exact",
        paper="Fan, Ng, Chan: Rethinking deep neural network ownership verification, NeurIPS 2019; shipped passports",
    ),
    Preset(
        name="deepipr_v2",
        version=1,
        source=Passports(),
        symbols=ChannelBits(256),
        statistic=Either(),
        training=PassportSigns(branch="shared"),
        null="exact",
        paper="Fan et al. 2019 (see deepipr_v1); private passports",
    ),
    Preset(
        name="deepipr_v3",
        version=1,
        source=Passports(),
        symbols=ChannelBits(256),
        statistic=Either(),
        training=PassportSigns(branch="shared", triggers=True),
        null="exact",
        paper="Fan et al. 2019 (see deepipr_v1); private passports that also learn the triggers of adi",
    ),
    Preset(
        name="passport_norm",
        version=1,
        source=Passports(),
        symbols=ChannelBits(256),
        statistic=Either(),
        training=PassportSigns(branch="separate", triggers=True),
        null="exact",
        paper="Zhang, Chen, Liao, Zhang, Hua, Yu: Passport-aware normalization, NeurIPS 2020",
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
        name="deepmarks",
        version=1,
        source=Weights(carrier="filter_mean", projection="gaussian", marked="widest"),
        symbols=Bits(256),
        statistic=Either(),
        training=Link(link="mse", strength=0.1),
        null="exact",
        paper="Chen, Rouhani, Fu, Zhao, Koushanfar: DeepMarks, a secure fingerprinting framework, ICMR 2019",
    ),
    Preset(
        name="stdm",
        version=1,
        source=PeriodicWeights(carrier="filter_mean", projection="gaussian", marked="widest"),
        symbols=Bits(256),
        statistic=Either(),
        training=Link(link="stdm", strength=0.01),
        null="exact",
        paper="Li, Tondi, Barni: Spread-transform dither modulation watermarking of DNNs, JISA 2021",
    ),
    Preset(
        name="neuralmark",
        version=1,
        source=Extracted(extractor="filtered", width=512),
        symbols=Bits(256),
        statistic=Either(),
        training=Link(link="bce", strength=0.004),
        null="exact",
        paper="Yao, Song, Jin: Hashed watermark as a filter (NeuralMark), 2025",
    ),
    Preset(
        name="greedy_residuals",
        version=1,
        source=Extracted(extractor="largest", width=32),
        symbols=Bits(256),
        statistic=Either(),
        training=Link(link="hinge", strength=0.1, margin=0.1),
        null="exact",
        paper="Liu, Weng, Zhu: Watermarking deep neural networks with greedy residuals, ICML 2021",
    ),
    Preset(
        name="riga",
        version=1,
        source=Extracted(extractor="perceptron", width=1024),
        symbols=Bits(256),
        statistic=Either(),
        training=Covert(strength=0.05, critic=0.3),
        null="exact",
        paper="Wang, Kerschbaum: RIGA, covert and robust white-box watermarking, WWW 2021",
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
