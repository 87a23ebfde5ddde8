"AudioSet's weights as they are published"
import torch

from stetholm.core.files import check_weights
from stetholm.model.networks import MobileNet, load_audioset


def test_the_published_weights_fill_the_mobilenet(audioset_weights):
    net = MobileNet()
    load_audioset(net, audioset_weights)
    published = torch.load(check_weights(audioset_weights), weights_only=True)
    known = {v.sum().item() for k, v in published.items() if k.startswith("features.")}
    assert {v.sum().item() for v in net.state_dict().values()} == known and sum(p.numel() for p in net.parameters()) == 516_128
