from exporters.graph_spec import graph_specs


def test_the_four_graphs_have_the_designs_names_and_shapes():
    specs = graph_specs(
        (4, 16, 16), (128, 128), embedding_width=128, feature_channels=64, consumed_channels=128
    )
    told = {
        name: [[(t.name, t.shape, t.dtype) for t in side] for side in (spec.inputs, spec.outputs)]
        for name, spec in specs.items()
    }
    latents = ("latents", (1, 4, 16, 16), "float32")
    timestep = ("timestep", (1,), "float32")
    embeddings = ("embeddings", (1, 77, 128), "float32")
    feature = ("cached_feature", (1, 64, 16, 16), "float32")
    noise = ("noise_pred", (1, 4, 16, 16), "float32")
    widths = {"gain": 64, "bias": 64, "output_gain": 128, "output_bias": 128}
    correction = [(name, (width,), "float32") for name, width in widths.items()]
    assert told == {
        "encode": [[("input_ids", (1, 77), "int64")], [embeddings]],
        "denoise": [[latents, timestep, embeddings], [noise, feature]],
        "denoise_shallow": [[latents, timestep, embeddings, feature, *correction], [noise]],
        "decode": [[latents], [("image", (1, 3, 128, 128), "float32")]],
    }
