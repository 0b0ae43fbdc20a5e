from contracts.conftest import compilations as compilations
