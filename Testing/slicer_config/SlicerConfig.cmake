# A stand-in for an installed Slicer: what the extension's CMakeLists use, with the checks that the real macros make.
# Point CMake at it with -DSlicer_DIR=Testing/slicer_config.
set(Slicer_USE_FILE ${CMAKE_CURRENT_LIST_DIR}/UseSlicer.cmake)
set(Slicer_EXTENSION_GENERATE_CONFIG ${CMAKE_CURRENT_LIST_DIR}/GenerateConfig.cmake)
set(Slicer_EXTENSION_CPACK ${CMAKE_CURRENT_LIST_DIR}/Cpack.cmake)
set(Slicer_FOUND TRUE)
