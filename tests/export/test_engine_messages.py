import pytest

from latentrt.export.engine_messages import failure_text, meaning_of

# As TensorRT wrote them: here, or in the public threads that the module names.
REAL = {
    "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([tactic.cpp:1676: enumerate_tactics] Tactic Selection: no "
    "tactics to implement the operation within workspace limit. Consider increase the allowed workspace size if "
    "applicable.; [tactic.cpp:264: run] Error during tactic selection.": "workspace",
    "[optimizer.cpp::nvinfer1::builder::cgraph::LeafCNode::computeCosts::3867] Error Code 4: Internal Error (Could not "
    "find any implementation for node /patch_embed/patch_embed.0/Conv due to insufficient workspace. See verbose log "
    "for requested sizes.).": "workspace",
    "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)": "memory",
    "[virtualMemoryBuffer.cpp::resizePhysical::154] Error Code 2: OutOfMemory (Requested size was 16581132288 bytes.)":
    "memory",
    "Error Code: 9: Skipping tactic 0x0000000000000000 due to exception [tunable_graph.cpp:create:117] autotuning: "
    "User allocator error allocating 15485030400-byte buffer": "memory",
    "IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any implementation for node "
    "{ForeignNode[/1/Constant_36_output_0.../1/Slice_4]}.)": "kernels",
    "[Matrix Multiply]_output: tensor volume exceeds (2^31)-1, dimensions are [4,65536,65536])": "2^31 values",
    "Assertion failed: creator && \"Plugin not found, are the plugin name, version, and namespace correct?\"":
    "does not know an operator",
    "IElementWiseLayer with inputs a and b: first input has type Half but second input has type Float.":
    "strongly typed",
    "onnx2trt_utils.cpp:1571: Failed to open file: transformer.wte.weight": "weights beside it",
    "IOptimizationProfile::isValid: Error Code 4: API Usage Error (Invalid optimization profiles for input tensors "
    "rows, please ensure that the optimization profiles satisfy MIN<=OPT<=MAX.": "do not fit the graph's inputs",
    "IBuilder::buildSerializedNetwork: Error Code 9: API Usage Error (Target GPU SM 61 is not supported by this "
    "TensorRT release.)": "no kernels for that GPU",
    "The engine plan file is generated on an incompatible device, expecting compute 8.6 got compute 7.5, please "
    "rebuild.": "another GPU or another TensorRT version",
    "IBuilder::buildSerializedNetwork: Error Code 6: API Usage Error (Unable to load library: libnvinfer_lean.so.1: "
    "cannot open shared object file": "--version-compatible",
    "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([myelin_graph.h:1295: attachExceptionMsgToGraph] "
    "MyelinCheckException: graph_jit.cpp:278: CHECK(status == CUDA_SUCCESS) failed.": "needs an NVIDIA GPU",
}  # fmt: skip


@pytest.mark.parametrize(("text", "meant"), REAL.items())
def test_real_messages_say_cause_and_remedy_and_keep_their_words(text: str, meant: str) -> None:
    meaning = meaning_of([("ERROR", text)])
    assert meaning is not None
    said = failure_text([("INFO", "Total Weights Memory: 5 bytes"), ("ERROR", text), ("ERROR", text)])
    assert said == f"{meaning.cause}. {meaning.remedy} TensorRT said: {text}"
    assert meant == meaning.kind or meant in f"{meaning.cause}. {meaning.remedy}"


def test_missing_kernels_are_for_want_of_memory_where_the_warnings_say_so() -> None:
    """As in issue 2643, whose one error named a node and whose warnings named the cause."""
    error = ("ERROR", "Error Code 10: Internal Error (Could not find any implementation for node conv_in.)")
    skipped = "Skipping tactic 3 due to insufficient memory on requested size of 68719476736 detected for tactic 0x74."
    meaning = meaning_of([("WARNING", skipped), error])
    assert meaning is not None
    assert meaning.kind == "memory"
    alone = meaning_of([("WARNING", "Detected layernorm nodes in FP16."), error])
    assert alone is not None
    assert alone.kind == "kernels"


def test_an_unknown_message_is_given_as_it_is() -> None:
    assert meaning_of([("ERROR", "something new")]) is None
    assert failure_text([("ERROR", "something new"), ("WARNING", "w")]) == "something new"
    assert failure_text([("WARNING", "w")]) == "no message"


def test_the_missing_driver_that_every_failure_ends_with_is_no_cause_of_its_own() -> None:
    driver = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at x (cudaError 35: "
    driver += "CUDA driver version is insufficient for CUDA runtime version))"
    assert failure_text([("ERROR", "something new"), ("ERROR", driver)]) == "something new"
    assert failure_text([("ERROR", driver)]).startswith("this build needs an NVIDIA GPU")
